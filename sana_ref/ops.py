"""What each custom op means, in plain PyTorch, and its registration as a `torch.library` op.

The `*_truth` functions are the definition: short, slow, and computed in fp32 or wider. Everything faster (the Triton kernel, the
ONNX function body, the TensorRT plugin) is judged against them. The registered ops run the truth on a CPU and the Triton kernel
on a CUDA GPU; float64, which only tests use, runs the truth everywhere.

Dimensions of attention: B images, H heads, N tokens, D channels per head; of the norm: B images, N tokens, D channels, R rows of a
table. Attention to a text is in attention_ops.py, convolutions are in gated_conv_ops.py and conv_ops.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EPS",
    "modulated_norm",
    "modulated_norm_truth",
    "qkv_linear_attention",
    "qkv_linear_attention_truth",
    "relu_linear_attention",
    "relu_linear_attention_truth",
    "without_autocast",
]

Modulation = tuple[Tensor, Tensor]  # time (B, R D), or (B, D) for all rows alike, and the table (R, D) that it is added to

EPS = 1e-15  # as the published diffusers models; must stay representable in fp32, where the division happens


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast reaches into custom ops and would run the fp32 state's matrix products in half precision."""
    return torch.autocast(device.type, enabled=False)


def relu_linear_attention_truth(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS, rotary: Tensor | None = None) -> Tensor:
    """out = relu(q) S / (relu(q) z + eps), where S = relu(k)^T v and z = the sum of relu(k) over N.

    q, k, v, out: (B, H, N, D), one dtype. S (B, H, D, D), z (B, H, D) and the division in fp32 or wider. rotary: of video, cosines
    and sines (2, N, D / 2) that turn pairs of channels of relu(q) and relu(k) in relu(q) S, and not in relu(q) z.
    Source: Sana, arXiv:2410.10629, section 3.2; eps as in diffusers' SanaLinearAttnProcessor2_0, rotary as in its
    SanaLinearAttnProcessor3_0, but in fp32.
    """
    with without_autocast(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        q_ND, k_ND, v_ND = q.relu().to(wide), k.relu().to(wide), v.to(wide)
        turned_q_ND, turned_k_ND = (q_ND, k_ND) if rotary is None else (_turned(t, rotary.to(wide)) for t in (q_ND, k_ND))
        top_ND = turned_q_ND @ (turned_k_ND.mT @ v_ND)
        bottom_N1 = q_ND @ k_ND.sum(-2)[..., None]
        return (top_ND / (bottom_N1 + eps)).to(v.dtype)


def _turned(x: Tensor, rotary: Tensor) -> Tensor:
    (even, odd), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotary
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The vector-Jacobian product of the truth, in fp32 or wider. S, z and the output are computed again rather than kept."""
    with without_autocast(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        q_ND, k_ND, v_ND, grad_ND = q.relu().to(wide), k.relu().to(wide), v.to(wide), grad.to(wide)
        state_DD, z_D1 = k_ND.mT @ v_ND, k_ND.sum(-2)[..., None]
        bottom_N1 = q_ND @ z_D1 + eps
        d_top_ND = grad_ND / bottom_N1
        d_bottom_N1 = -(d_top_ND * (q_ND @ state_DD)).sum(-1, keepdim=True) / bottom_N1
        d_state_DD, d_z_D1 = q_ND.mT @ d_top_ND, q_ND.mT @ d_bottom_N1
        d_q_ND = d_top_ND @ state_DD.mT + d_bottom_N1 @ z_D1.mT
        d_k_ND = v_ND @ d_state_DD.mT + d_z_D1.mT
        d_v_ND = k_ND @ d_state_DD
        # where, not a product: without any positive q or k the other factor is of the order 1 / eps
        return torch.where(q > 0, d_q_ND, 0).to(q.dtype), torch.where(k > 0, d_k_ND, 0).to(k.dtype), d_v_ND.to(v.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"relu_linear_attention: got q, k, v of shapes {shapes}; expected one shape (B, H, N, D) for all three")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"relu_linear_attention: got q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one floating dtype for all. "
            "Under autocast a norm may return fp32: cast q and k to v's dtype first."
        )


@torch.library.custom_op("sana::relu_linear_attention", mutates_args=())
def _relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    _check(q, k, v)
    return torch.empty_like(v).copy_(relu_linear_attention_truth(q, k, v, eps))


@_relu_linear_attention.register_kernel("cuda")
def _relu_linear_attention_cuda(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    _check(q, k, v)
    if q.dtype == torch.float64:
        return torch.empty_like(v).copy_(relu_linear_attention_truth(q, k, v, eps))
    from plugins import relu_linear_attention as kernel  # Triton loads when a GPU first needs it

    out = torch.empty_like(v)
    kernel.launch(q, k, v, out, eps)
    return out


@_relu_linear_attention.register_fake
def _relu_linear_attention_fake(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    return torch.empty_like(v)


def _keep_inputs(ctx, inputs, output) -> None:
    q, k, v, ctx.eps = inputs
    ctx.save_for_backward(q, k, v)


def _gradients_as_inputs(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients`, each laid out in memory as its input: an op's results must not depend on the device in that."""
    d_q, d_k, d_v = _gradients(grad, q, k, v, eps)
    return torch.empty_like(q).copy_(d_q), torch.empty_like(k).copy_(d_k), torch.empty_like(v).copy_(d_v)


@torch.library.custom_op("sana::relu_linear_attention_backward", mutates_args=())
def _relu_linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for q, k, v: an op of its own, so that a compiled step has one node each way."""
    return _gradients_as_inputs(grad, q, k, v, eps)


@_relu_linear_attention_backward.register_kernel("cuda")
def _relu_linear_attention_backward_cuda(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    from plugins import relu_linear_attention_backward as kernels  # Triton loads when a GPU first needs it

    if q.dtype == torch.float64 or q.shape[-1] not in kernels.HEAD_DIMS:
        return _gradients_as_inputs(grad, q, k, v, eps)
    outputs = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    kernels.launch(grad, (q, k, v), outputs, eps)
    return outputs


@_relu_linear_attention_backward.register_fake
def _relu_linear_attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.sana.relu_linear_attention_backward(grad, *ctx.saved_tensors, ctx.eps), None


_relu_linear_attention.register_autograd(_backward, setup_context=_keep_inputs)


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """`relu_linear_attention_truth` as the op `sana::relu_linear_attention`: exports as one node, trains, and is fast on a GPU.

    q, k, v: (B, H, N, D), one dtype of fp16, bf16, fp32, fp64, any strides; returns (B, H, N, D), same dtype, laid out as v. On
    CUDA (except fp64) D is 16, 32, 64 or 128. Differentiable once; gradients come in the inputs' dtype, computed in fp32 or wider.
    Raises ValueError if shapes or dtypes differ.
    """
    return torch.ops.sana.relu_linear_attention(q, k, v, eps)


def qkv_linear_attention_truth(
    qkv: Tensor, num_heads: int, eps: float = EPS, interleaved: bool = False, rotary: Tensor | None = None
) -> Tensor:
    """`relu_linear_attention_truth` of q, k and v as one projection leaves them, heads joined again.

    qkv (B, N, 3 H D): all of q, then of k, then of v; interleaved: q, k and v of the first head, then of the next (DC-AE). rotary:
    as there; the op `sana::qkv_linear_attention` has none, as image models have none.
    Returns (B, N, H D), same dtype.
    """
    if interleaved:
        q, k, v = qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    else:
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return relu_linear_attention_truth(q, k, v, eps, rotary).transpose(1, 2).flatten(2)


def _check_qkv(qkv: Tensor, num_heads: int) -> None:
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads) or not qkv.dtype.is_floating_point:
        raise ValueError(
            f"qkv_linear_attention: got qkv {tuple(qkv.shape)} {qkv.dtype}, {num_heads} heads; expected floating (B, N, 3 H D)"
        )


@torch.library.custom_op("sana::qkv_linear_attention", mutates_args=())
def _qkv_linear_attention(qkv: Tensor, num_heads: int, eps: float = EPS, interleaved: bool = False) -> Tensor:
    _check_qkv(qkv, num_heads)
    return qkv_linear_attention_truth(qkv, num_heads, eps, interleaved).contiguous()


@_qkv_linear_attention.register_kernel("cuda")
def _qkv_linear_attention_cuda(qkv: Tensor, num_heads: int, eps: float = EPS, interleaved: bool = False) -> Tensor:
    _check_qkv(qkv, num_heads)
    if qkv.dtype == torch.float64:
        return qkv_linear_attention_truth(qkv, num_heads, eps, interleaved).contiguous()
    from plugins import qkv_linear_attention as kernels

    out = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))
    kernels.launch(qkv.contiguous(), out, num_heads, eps, interleaved=interleaved)
    return out


@_qkv_linear_attention.register_fake
def _qkv_linear_attention_fake(qkv: Tensor, num_heads: int, eps: float = EPS, interleaved: bool = False) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def qkv_linear_attention(qkv: Tensor, num_heads: int, eps: float = EPS, interleaved: bool = False) -> Tensor:
    """`qkv_linear_attention_truth` as the op `sana::qkv_linear_attention`, for engines: it is not differentiable.

    qkv: (B, N, 3 H D) of fp16, bf16, fp32 or fp64; on CUDA (except fp64) D is 16, 32, 64 or 112. Returns (B, N, H D), contiguous.
    Raises ValueError for other shapes.
    """
    out: Tensor = torch.ops.sana.qkv_linear_attention(qkv, num_heads, eps, interleaved)
    return out


def _modulation_row(modulation: Modulation, row: int, wide: torch.dtype) -> Tensor:
    """(B, 1, D)."""
    time, table = modulation
    return (table.to(wide) + time.to(wide).unflatten(1, (-1, table.shape[1])))[:, row : row + 1]


def modulated_norm_truth(
    x: Tensor, branch: Tensor, modulation: Modulation, gate: Modulation | None, rows: Sequence[int], *, rms: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """(hidden, normed), where hidden = x + g branch and normed = norm(hidden) (1 + scale) + shift.

    x, branch, hidden, normed: (B, N, D), results in x's dtype, computed in fp32 or wider; the norm is that of hidden before it is
    rounded: a LayerNorm over D without parameters, or an RMSNorm if `rms`. rows: which rows of the modulation shift and scale are,
    and, where there is a gate, which of its own g is; without one g is 1.
    Source: adaLN-single as in PixArt-alpha, arXiv:2310.00426, section 2.3.
    """
    with without_autocast(x.device):
        wide = torch.promote_types(x.dtype, torch.float32)
        branch = branch.to(wide) if gate is None else _modulation_row(gate, rows[2], wide) * branch.to(wide)
        hidden = x.to(wide) + branch
        normed = (F.rms_norm if rms else F.layer_norm)(hidden, hidden.shape[-1:], eps=eps)
        normed = normed * (1 + _modulation_row(modulation, rows[1], wide)) + _modulation_row(modulation, rows[0], wide)
        return hidden.to(x.dtype).contiguous(), normed.to(x.dtype).contiguous()


def _check_norm(x: Tensor, branch: Tensor, modulation: Modulation, gate: Modulation | None, rows: Sequence[int]) -> None:
    def fits(modulation: Modulation, rows: Sequence[int]) -> bool:
        time, table = modulation
        shaped = (
            table.ndim == 2 and table.shape[1] == x.shape[-1] and time.shape in [(len(x), table.numel()), (len(x), x.shape[-1])]
        )
        return shaped and all(0 <= row < len(table) for row in rows)

    good = x.ndim == 3 and x.shape == branch.shape and x.dtype == branch.dtype and len(rows) == (2 if gate is None else 3)
    if not good or not fits(modulation, rows[:2]) or not (gate is None or fits(gate, rows[2:])):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (x, branch, *modulation, *(gate or ())))
        raise ValueError(
            f"modulated_norm: got {shapes}, rows {list(rows)}; expected x and branch (B, N, D) of one dtype, time (B, R D) or "
            "(B, D), table (R, D), both again for a gate, and rows of the tables for shift, scale and gate"
        )


@torch.library.custom_op("sana::modulated_norm", mutates_args=())
def _modulated_norm(
    x: Tensor,
    branch: Tensor,
    time: Tensor,
    table: Tensor,
    gate_time: Tensor | None,
    gate_table: Tensor | None,
    rows: Sequence[int],
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    gate = None if gate_time is None or gate_table is None else (gate_time, gate_table)
    _check_norm(x, branch, (time, table), gate, rows)
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return modulated_norm_truth(x, branch, (time, table), gate, rows, rms=rms, eps=eps)
    from plugins import modulated_norm as kernel  # Triton loads when a GPU first needs it

    outputs = (x.new_empty(x.shape), x.new_empty(x.shape))
    kernel.launch(x.contiguous(), branch.contiguous(), (time, table), gate, outputs, rows=tuple(rows), rms=rms, eps=eps)
    return outputs


@_modulated_norm.register_fake
def _modulated_norm_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def modulated_norm(
    x: Tensor,
    branch: Tensor,
    modulation: Modulation,
    gate: Modulation | None,
    rows: Sequence[int],
    *,
    rms: bool = False,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`modulated_norm_truth` as the op `sana::modulated_norm`, for engines: it is not differentiable.

    x and branch: (B, N, D), one dtype of fp16, bf16, fp32 or fp64; results are contiguous. Raises ValueError for other shapes.
    """
    outputs: tuple[Tensor, Tensor] = torch.ops.sana.modulated_norm(x, branch, *modulation, *(gate or (None, None)), rows, rms, eps)
    return outputs
