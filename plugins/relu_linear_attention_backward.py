"""The gradient of ReLU linear attention as three Triton kernels, for training on a GPU.

Its meaning is the vector-Jacobian product of `relu_linear_attention_truth` in sana_ref/ops.py. With q and k after their relu, and g
the gradient of out:

    S = k^T v,  z = sum of k,  b = q z + eps,  out = q S / b                                 (1) sums over tokens: S, z
    p = q / b,  c = g · out,  dq = (g S^T - c z) / b,  dS = p^T g,  dz = -sum of c p         (2) dq, and sums: dS, dz
    dk = v dS^T + dz,  dv = k dS                                                             (3) dk, dv

and dq, dk are 0 where q, k are not positive. Three kernels because each needs the whole sums of the one before; S, z, b and out are
computed again rather than kept. Together they read q and g once, k and v twice and write three results: memory traffic that one
kernel for all would not lower, since the k and v of the heads under way exceed the L2 cache. A head's tokens are split between
programs that leave their part of the sums in a workspace; the next kernel adds the parts up in a fixed order, so results repeat.

Precision: sums, divisions and results of products in fp32. Each product has one operand that the inputs' dtype holds exactly (q, k,
v, g) and one of fp32, which keeps at least 16 bits: bf16 takes it as two bf16 numbers, fp16 goes through 3 TF32 products, and fp32
through fp32 ones.

Dimensions: B images, H heads, N tokens, D channels per head. A tensor argument of a kernel is (pointer, its strides of B, H, N, D).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["HEAD_DIMS", "Plan", "launch", "plan"]

OP = "ReluLinearAttention's gradient"
HEAD_DIMS = (16, 32, 64)  # not the forward kernel's 128: two halves of S in both orders take more shared memory than there is
PRECISIONS = {"bf16": "split", "fp16": "tf32x3", "fp32": "ieee"}  # of products with an fp32 operand
PROGRAMS = 16 * 132  # enough rounds of an H100's 132 multiprocessors that the last, part full one costs little


@triton.jit
def _at(x, head, num_heads, n_N, D: tl.constexpr):
    """Pointers (N, D) to tokens n_N. int64: 64 images of 4096 px pass 2**31 elements."""
    base = x[0] + (head // num_heads).to(tl.int64) * x[1] + (head % num_heads).to(tl.int64) * x[2]
    return base + n_N.to(tl.int64)[:, None] * x[3] + tl.arange(0, D).to(tl.int64)[None, :] * x[4]


@triton.jit
def _relu(x):
    """In fp32. A NaN stays one, as in torch.relu; plain maximum would turn it into 0."""
    return tl.maximum(x.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_dot(start, exact, wide, PRECISION: tl.constexpr):
    """start + exact @ wide in fp32. exact: numbers that the inputs' dtype holds; wide: fp32."""
    if PRECISION == "split":
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(exact.to(tl.bfloat16), high, tl.dot(exact.to(tl.bfloat16), low, start))
    else:
        return tl.dot(exact.to(tl.float32), wide, start, input_precision=PRECISION)


@triton.jit
def _store_sums(sums, matrix_DD, row_D, D: tl.constexpr):
    """The program's part of a head's sums: (D + 1, D), the row last."""
    d = tl.arange(0, D)
    part = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (D + 1) * D
    tl.store(part + d[:, None] * D + d[None, :], matrix_DD)
    tl.store(part + D * D + d, row_D)


@triton.jit
def _load_sums(sums, D: tl.constexpr):
    d = tl.arange(0, D)
    matrix_DD, row_D = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for split in range(tl.num_programs(1)):
        part = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split) * (D + 1) * D
        matrix_DD += tl.load(part + d[:, None] * D + d[None, :])
        row_D += tl.load(part + D * D + d)
    return matrix_DD, row_D


@triton.jit
def _sum_state(k, v, sums, num_heads, n_tokens, n_split, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """(1): S and z of n_split tokens."""
    head, first = tl.program_id(0), tl.program_id(1) * n_split
    state_DD, z_D = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for start in range(first, min(first + n_split, n_tokens), BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        live = (n_N < n_tokens)[:, None]
        k_ND = _relu(tl.load(_at(k, head, num_heads, n_N, D), mask=live, other=0.0))
        v_ND = tl.load(_at(v, head, num_heads, n_N, D), mask=live, other=0.0)
        # Products of half precision are exact in fp32, whatever input_precision says.
        state_DD = tl.dot(tl.trans(k_ND.to(v_ND.dtype)), v_ND, state_DD, input_precision="ieee")
        z_D += tl.sum(k_ND, axis=0)
    _store_sums(sums, state_DD, z_D, D)


@triton.jit
def _grad_q(
    q, grad, dq, sums, d_sums, num_heads, n_tokens, n_split, eps, D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):
    """(2): dq, and dS^T and dz of n_split tokens."""
    head, first = tl.program_id(0), tl.program_id(1) * n_split
    state_DD, z_D = _load_sums(sums, D)
    d_state_DD, d_z_D = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    zero_ND = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(first, min(first + n_split, n_tokens), BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        live = (n_N < n_tokens)[:, None]
        q_ND = _relu(tl.load(_at(q, head, num_heads, n_N, D), mask=live, other=0.0))
        g_ND = tl.load(_at(grad, head, num_heads, n_N, D), mask=live, other=0.0)
        bottom_N1 = (tl.sum(q_ND * z_D[None, :], axis=1) + eps)[:, None]
        bottom_N1 = tl.where(live, bottom_N1, 1.0)  # with eps 0, tokens past the end would add NaN
        inverse_N1 = tl.div_rn(1.0, bottom_N1)
        out_ND = _add_dot(zero_ND, q_ND, state_DD, PRECISION) * inverse_N1
        c_N1 = tl.sum(g_ND.to(tl.float32) * out_ND, axis=1)[:, None]
        dq_ND = _add_dot(-c_N1 * z_D[None, :], g_ND, tl.trans(state_DD), PRECISION) * inverse_N1
        # where, not a product: without any positive q or k the other factor is of the order 1 / eps
        tl.store(_at(dq, head, num_heads, n_N, D), tl.where(q_ND > 0, dq_ND, 0.0).to(dq[0].dtype.element_ty), mask=live)
        p_ND = q_ND * inverse_N1
        d_state_DD = _add_dot(d_state_DD, tl.trans(g_ND), p_ND, PRECISION)
        d_z_D -= tl.sum(c_N1 * p_ND, axis=0)
    _store_sums(d_sums, d_state_DD, d_z_D, D)


@triton.jit
def _grad_kv(k, v, dk, dv, d_sums, num_heads, n_tokens, n_split, D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """(3): dk and dv of n_split tokens."""
    head, first = tl.program_id(0), tl.program_id(1) * n_split
    d_state_DD, d_z_D = _load_sums(d_sums, D)  # dS^T: a row for each channel of v
    zero_ND = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(first, min(first + n_split, n_tokens), BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        live = (n_N < n_tokens)[:, None]
        k_ND = _relu(tl.load(_at(k, head, num_heads, n_N, D), mask=live, other=0.0))
        v_ND = tl.load(_at(v, head, num_heads, n_N, D), mask=live, other=0.0)
        dk_ND = _add_dot(zero_ND + d_z_D[None, :], v_ND, d_state_DD, PRECISION)
        dv_ND = _add_dot(zero_ND, k_ND, tl.trans(d_state_DD), PRECISION)
        tl.store(_at(dk, head, num_heads, n_N, D), tl.where(k_ND > 0, dk_ND, 0.0).to(dk[0].dtype.element_ty), mask=live)
        tl.store(_at(dv, head, num_heads, n_N, D), dv_ND.to(dv[0].dtype.element_ty), mask=live)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """num_splits programs of n_split tokens for each head; block_n tokens a step; num_stages loads under way at once."""

    num_splits: int
    n_split: int
    block_n: int
    num_warps: int
    num_stages: int


def plan(*, batch: int, heads: int, tokens: int, head_dim: int, dtype: str) -> Plan:
    """How to launch for inputs (batch, heads, tokens, head_dim) of "fp16", "bf16" or "fp32".

    Tokens are split until PROGRAMS are there, but not further than sqrt(N / D): each program reads the sums of all splits, D x D
    numbers apiece, which is not to exceed what it reads of its own N / splits tokens. Steps are as long as registers allow.
    Raises ValueError for a head_dim or dtype that the kernels have not.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{OP}: got head_dim {head_dim}; expected one of {HEAD_DIMS}")
    if dtype not in PRECISIONS:
        raise ValueError(f"{OP}: got dtype {dtype!r}; expected one of {', '.join(PRECISIONS)}")
    narrow = dtype == "bf16"
    block_n, num_warps, num_stages = {
        16: (64, 4, 3),
        32: (128, 4, 3) if narrow else (32, 4, 2),  # bf16: the fastest of 36 on an H200, at Sana-1.6B's shapes
        64: (32 if narrow else 16, 8, 2),
    }[head_dim]
    num_splits = max(1, min(math.ceil(PROGRAMS / max(1, batch * heads)), math.isqrt(tokens // head_dim)))
    n_split = max(1, math.ceil(tokens / (num_splits * block_n))) * block_n
    return Plan(
        num_splits=max(1, math.ceil(tokens / n_split)),
        n_split=n_split,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def launch(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
    eps: float,
    tile: Plan | None = None,
) -> None:
    """Write the gradients for inputs (q, k, v) into outputs (dq, dk, dv), where grad is that of the attention's output.

    All (B, H, N, D), one dtype of fp16, bf16, fp32, on the current GPU, with any strides; outputs must not overlap anything.
    tile: how, if not as plan() says. Raises ValueError unless shapes and dtypes are such and D is in HEAD_DIMS.
    """
    (q, k, v), (dq, dk, dv) = inputs, outputs
    tensors = (grad, q, k, v, dq, dk, dv)
    if q.ndim != 4 or not all(t.shape == q.shape and t.dtype == q.dtype and t.device == q.device for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(f"{OP}: got grad, q, k, v, dq, dk, dv {seen}; expected one shape (B, H, N, D), dtype and device")
    batch, heads, tokens, head_dim = q.shape
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(q.dtype, str(q.dtype))
    tile = tile or plan(batch=batch, heads=heads, tokens=tokens, head_dim=head_dim, dtype=dtype)
    if tile.n_split % tile.block_n:
        raise ValueError(f"{OP}: got {tile}; expected n_split to be a multiple of block_n")
    if q.numel() == 0:
        return
    grid = (batch * heads, tile.num_splits)
    sums, d_sums = q.new_empty((2, *grid, head_dim + 1, head_dim), dtype=torch.float32)
    g, q, k, v, dq, dk, dv = ((t, *t.stride()) for t in tensors)
    sizes = (heads, tokens, tile.n_split)
    options = {
        "D": head_dim,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    _sum_state[grid](k, v, sums, *sizes, **options)
    _grad_q[grid](q, g, dq, sums, d_sums, *sizes, eps, PRECISION=PRECISIONS[dtype], **options)
    _grad_kv[grid](k, v, dk, dv, d_sums, *sizes, PRECISION=PRECISIONS[dtype], **options)
