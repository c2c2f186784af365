"""ReLU linear attention straight from a fused QKV projection, split over tokens: two Triton kernels, ONNX bodies, cubins.

Its meaning is `qkv_linear_attention_truth` in sana_ref/ops.py. Two ops, because every output needs the sums over all tokens:

    LinearAttentionState    qkv -> state: S = relu(k)^T v and z = the sum of relu(k), in parts, each over some of the tokens
    LinearAttentionApply    qkv, state -> out = relu(q) S / (relu(q) z + eps)

Heads are read where the projection left them and written where the next projection wants them: nothing is transposed in between.
The number of parts grows with the tokens, so that 4K (16,384 tokens) fills a GPU as 1K does; they are added up in a fixed order.

Where a product in 8 bits follows, a build for TensorRT gives an Apply an `out_scale` (plugins/static_scale.py).

Precision: the sums and the division in fp32. S meets q on tensor cores: with bf16 inputs as two bf16 numbers (16 bits); with fp16
ones in TF32, rounded to the 11 bits that q and out have. That errs 1.12 times as much as fp32 does (root mean square over random
tokens, whose outputs are rounded to fp16). Three TF32 products, which stand for one of fp32, take 13.2 us on an H200 for 2048
tokens of 70 heads to FP8, one 9.2; of 36 heads 8.6 and 6.8.

Dimensions: B images, H heads, N tokens, D channels per head, P parts. qkv (B, N, 3, H, D) as a transformer's projection, or
interleaved, (B, N, H, 3, D), as DC-AE's; state (B, H, P, D + 1, D), z last; out (B, N, H, D).
"""

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.launch import Output
from plugins.static_scale import OutKind, as_output, check_outputs, output_kinds, quantized_outputs

if TYPE_CHECKING:
    import onnx
    import torch

    from plugins.static_scale import Quantized

STATE, APPLY = "LinearAttentionState", "LinearAttentionApply"
DOMAIN = "sana"
EPS = 1e-15  # as sana_ref.ops.EPS; a test holds the two together
HEAD_DIMS = (16, 32, 64)  # 16: the least that a tensor core takes; the published models have 32
PRECISIONS = {"bf16": "split", "fp16": "tf32", "fp32": "ieee"}  # of the product with S
# Tokens a step, warps of a program, loads under way: measured on an H200 with the heads of Sana-1.6B, as are the parts. One warp a
# program of State: 0.008 ms where four took 0.017 (1024 px). fp32 and wide heads have more registers and so smaller steps there.
PLANS = {STATE: (64, 1, 1), APPLY: (64, 4, 1)}
SMALL_STATE = (32, 1, 3)
PART, LONG_PART = 128, 512  # tokens of a part of the state: the shorter until there are PARTS, then the longer
PARTS, MAX_PARTS = 8, 16  # each program of Apply reads them all
LEAST_BLOCKS, MOST_BLOCKS = 4, 8  # of a program of Apply, each of whom reads all parts: 140 us with 4 of 16384 tokens, 118 with 8
TOKENS_A_BLOCK = 2048  # in between


@triton.jit
def _relu(x):
    # A NaN must come out as NaN, as from torch.relu; plain maximum would turn it into 0.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _dot(exact, wide, PRECISION: tl.constexpr):
    """exact @ wide in fp32. exact: numbers that the inputs' dtype holds; wide: fp32."""
    if PRECISION == "split":
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(exact.to(tl.bfloat16), high, tl.dot(exact.to(tl.bfloat16), low))
    elif PRECISION == "tf32":
        # To nearest, where a tensor core cuts off. Not of a NaN, whose bits may become a number's.
        rounded = ((wide.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.dot(exact.to(tl.float32), tl.where(wide == wide, rounded, wide), input_precision="tf32")
    else:
        return tl.dot(exact.to(tl.float32), wide, input_precision=PRECISION)


@triton.jit
def _channel(number: tl.constexpr, head, heads, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where in a row the head's q (0), k (1) or v (2) starts."""
    if INTERLEAVED:
        return (3 * head + number) * D
    else:
        return (number * heads + head) * D


@triton.jit
def state_kernel(qkv, state, heads, n_tokens, n_part, D: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A program: one head of an image, n_part tokens."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row = 3 * heads * D
    d = tl.arange(0, D)
    first_D = qkv + image.to(tl.int64) * n_tokens * row + d  # int64: 64 images of 4096 px pass 2**31 elements
    k_D, v_D = first_D + _channel(1, head, heads, D, INTERLEAVED), first_D + _channel(2, head, heads, D, INTERLEAVED)
    first = tl.program_id(1) * n_part
    state_DD, z_D = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for start in range(first, min(first + n_part, n_tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at, live = n.to(tl.int64)[:, None] * row, n[:, None] < n_tokens
        k_ND = _relu(tl.load(k_D[None, :] + at, mask=live, other=0.0)).to(qkv.dtype.element_ty)
        v_ND = tl.load(v_D[None, :] + at, mask=live, other=0.0)
        # ieee: for fp32 inputs; the default, TF32, has 10 bits of mantissa. Half precision products are exact in fp32 anyway.
        state_DD = tl.dot(tl.trans(k_ND), v_ND, state_DD, input_precision="ieee")
        z_D += tl.sum(k_ND.to(tl.float32), axis=0)
    part = state + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (D + 1) * D
    tl.store(part + d[:, None] * D + d[None, :], state_DD)
    tl.store(part + D * D + d, z_D)


@triton.jit
def _tile(q_D, row, start, end, BLOCK_N: tl.constexpr):
    n = start + tl.arange(0, BLOCK_N)
    return tl.load(q_D[None, :] + n.to(tl.int64)[:, None] * row, mask=n[:, None] < end, other=0.0)


@triton.jit
def apply_kernel(
    qkv,
    state,
    out,
    out_scales,
    heads,
    n_tokens,
    n_tile,
    parts,
    eps,
    out_scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program: one head of an image, n_tile tokens. out_scale: None, or out is in 8 bits; out_scales: None, or it has scales."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    d = tl.arange(0, D)
    tokens, row = image.to(tl.int64) * n_tokens, 3 * heads * D
    q_D = qkv + tokens * row + _channel(0, head, heads, D, INTERLEAVED) + d
    out_D = out + tokens * heads * D + head * D + d
    first = tl.program_id(1) * n_tile
    # Tokens are loaded ahead: the first before the parts, each next while these are computed.
    next_ND = _tile(q_D, row, first, n_tokens, BLOCK_N)
    state_DD, z_D = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for number in range(parts):
        part = state + (tl.program_id(0).to(tl.int64) * parts + number) * (D + 1) * D
        state_DD += tl.load(part + d[:, None] * D + d[None, :])
        z_D += tl.load(part + D * D + d)
    if out_scales is not None:  # a loop of its own: in the next one it takes ten registers
        if head == 0:
            for start in range(first, min(first + n_tile, n_tokens), BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                tl.store(out_scales + tokens + n, tl.zeros((BLOCK_N,), tl.float32) + out_scale, mask=n < n_tokens)
    for start in range(first, min(first + n_tile, n_tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q_ND = _relu(next_ND)
        next_ND = _tile(q_D, row, start + BLOCK_N, min(first + n_tile, n_tokens), BLOCK_N)
        top_ND = _dot(q_ND, state_DD, PRECISION)
        bottom_N = tl.sum(q_ND.to(tl.float32) * z_D[None, :], axis=1) + eps
        if out_scale is None:
            # One division a token, not one a channel: exact division is a call of some thirty instructions.
            out_ND = top_ND * tl.div_rn(1.0, bottom_N)[:, None]
        else:
            out_ND = top_ND * (1.0 / (bottom_N * out_scale))[:, None]
        tl.store(
            out_D[None, :] + n.to(tl.int64)[:, None] * (heads * D), as_output(out_ND, out, out_scales), mask=n[:, None] < n_tokens
        )


def _check(dtype: str, head_dim: int) -> None:
    cubin.check_type(STATE, dtype)
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{STATE}: got head_dim {head_dim}; expected one of {HEAD_DIMS}")


def num_parts(tokens: int) -> int:
    """P."""
    return min(math.ceil(tokens / PART), max(PARTS, math.ceil(tokens / LONG_PART)), MAX_PARTS)


def tile(tokens: int) -> int:
    """Tokens of a program of Apply: whole blocks."""
    return PLANS[APPLY][0] * min(MOST_BLOCKS, max(LEAST_BLOCKS, tokens // TOKENS_A_BLOCK))


def _part(tokens: int, parts: int) -> int:
    """Tokens of a part: whole steps."""
    block = PLANS[STATE][0]
    return math.ceil(tokens / (parts * block)) * block


def plan(op: str, dtype: str, head_dim: int) -> dict[str, int]:
    """BLOCK_N, num_warps, num_stages."""
    chosen = SMALL_STATE if op == STATE and (dtype == "fp32" or head_dim > 32) else PLANS[op]
    return dict(zip(("BLOCK_N", "num_warps", "num_stages"), chosen, strict=True))


def launch(
    qkv: "torch.Tensor",
    out: "torch.Tensor",
    num_heads: int,
    eps: float = EPS,
    *,
    interleaved: bool = False,
    quantized: "Quantized | None" = None,
) -> None:
    """Write the attention of qkv (B, N, 3 H D) into out (B, N, H D): contiguous, one dtype of fp16, bf16, fp32, on the current GPU.

    quantized: out is in 8 bits; also write these scales, if any. Raises ValueError unless that holds and D is in HEAD_DIMS.
    """
    import torch

    batch, tokens, width = out.shape
    fits = qkv.shape == (batch, tokens, 3 * width) and width % num_heads == 0 and qkv.is_contiguous() and out.is_contiguous()
    check_outputs(APPLY, out, quantized)
    if not fits or (qkv.dtype != out.dtype and not quantized) or qkv.device != out.device:
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in (qkv, out))
        raise ValueError(f"{APPLY}: got qkv, out {seen}, {num_heads} heads; expected (B, N, 3 H D) and (B, N, H D), contiguous")
    head_dim = width // num_heads
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(qkv.dtype), str(qkv.dtype))
    _check(dtype, head_dim)
    if out.numel() == 0:
        return
    parts = num_parts(tokens)
    n_part = _part(tokens, parts)
    state = qkv.new_empty((batch, num_heads, parts, head_dim + 1, head_dim), dtype=torch.float32)
    state_kernel[batch * num_heads, parts](
        qkv, state, num_heads, tokens, n_part, INTERLEAVED=interleaved, D=head_dim, **plan(STATE, dtype, head_dim)
    )
    scales, scale = quantized or (None, None)
    n_tile = tile(tokens)
    apply_kernel[batch * num_heads, math.ceil(tokens / n_tile)](
        qkv,
        state,
        out,
        scales,
        num_heads,
        tokens,
        n_tile,
        parts,
        eps,
        scale,
        INTERLEAVED=interleaved,
        PRECISION=PRECISIONS[dtype],
        D=head_dim,
        **plan(APPLY, dtype, head_dim),
    )


def layout(heads: int, head_dim: int, *, interleaved: bool) -> dict[str, Any]:
    """How a node reads a row of qkv. split: the shape of qkv with 0 for what stays; axis: that of q, k and v in it."""
    return {"split": [0, 0, heads, 3, head_dim], "axis": 3} if interleaved else {"split": [0, 0, 3, heads, head_dim], "axis": 2}


@functools.cache
def compile_cubin(
    op: str, capability: int, dtype: str, head_dim: int, interleaved: bool, quantized: OutKind | None = None
) -> Cubin:
    """For STATE or APPLY and an SM such as 89. Raises ValueError for one that has no fp8, if that is asked for."""
    chosen = plan(op, dtype, head_dim)
    constants: dict[str, Any] = {"D": head_dim, "BLOCK_N": chosen["BLOCK_N"], "INTERLEAVED": interleaved}
    signature = {"qkv": f"*{dtype}", "state": "*fp32"}
    if op == STATE:
        kernel, signature = state_kernel, signature | dict.fromkeys(("heads", "n_tokens", "n_part"), "i32")
    else:
        kinds, absent = output_kinds(op, capability, dtype, quantized)
        numbers = dict.fromkeys(("heads", "n_tokens", "n_tile", "parts"), "i32") | {"eps": "fp32"}
        outputs = {name: kinds[name] for name in ("out", "out_scales")}
        kernel, signature = apply_kernel, signature | outputs | numbers | {"out_scale": kinds["out_scale"]}
        constants |= {"PRECISION": PRECISIONS[dtype]} | absent
    return cubin.compile_cubin(
        kernel,
        capability,
        op=op,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=("qkv", "state", "out", "out_scales"),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )


def compile_cubins(
    op: str,
    targets: Iterable[str],
    dtype: str,
    heads: int,
    head_dim: int,
    eps: float = EPS,
    *,
    interleaved: bool = False,
    out_scale: float | None = None,
    out_kind: OutKind = "fp8",
) -> dict[str, str | bytes | float | list[int]]:
    """Every attribute of a node of STATE or APPLY for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of qkv and out; head_dim one of HEAD_DIMS, else ValueError. out_scale, out_kind: of bits, where
    they are the output (APPLY alone). The function bodies read what layout() gives, and eps.
    """
    _check(dtype, head_dim)
    batch, tokens = ["dim", 0, 0], ["dim", 0, 1]
    parts = ["min", ["min", ["ceildiv", tokens, PART], ["max", PARTS, ["ceildiv", tokens, LONG_PART]]], MAX_PARTS]
    rows = ["mul", batch, heads]
    split: dict[str, Any] = layout(heads, head_dim, interleaved=interleaved)
    if op == STATE:
        block = PLANS[STATE][0]
        n_part = ["mul", ["ceildiv", tokens, ["mul", parts, block]], block]
        return split | cubin.attributes(
            op,
            targets,
            lambda capability: compile_cubin(op, capability, dtype, head_dim, interleaved),
            inputs=[dtype],
            outputs=[Output(type="fp32", shape=[batch, heads, parts, head_dim + 1, head_dim])],
            grid=[rows, parts, 1],
            args=[["in", 0], ["out", 0], ["i32", heads], ["i32", tokens], ["i32", n_part]],
        )
    n_tile = ["mul", PLANS[APPLY][0], ["min", MOST_BLOCKS, ["max", LEAST_BLOCKS, ["floordiv", tokens, TOKENS_A_BLOCK]]]]
    numbers = [["i32", number] for number in (heads, tokens, n_tile, ["dim", 1, 2])]
    kind = out_kind if out_scale is not None else None
    outputs, more_args, last_args = quantized_outputs(dtype, [batch, tokens], heads * head_dim, out_scale, kind)
    found = cubin.attributes(
        op,
        targets,
        lambda capability: compile_cubin(op, capability, dtype, head_dim, interleaved, kind),
        inputs=[dtype, "fp32"],
        outputs=outputs,
        grid=[rows, ["ceildiv", tokens, n_tile], 1],
        args=[["in", 0], ["in", 1], *more_args, *numbers, ["f32", eps], *last_args],
    )
    return split | found | {"eps": eps}


def function_body(op: str, opset: int = 20) -> "onnx.FunctionProto":
    """STATE or APPLY in standard ONNX operators, for every reader that has no plugin: fp32 inside; the state has one part.

    Attributes `split` (required), `axis` (2 unless given) and, of APPLY, eps; the plugin's are allowed and unused. opset: of the
    standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def from_attribute(name: str, attribute: str, kind: "AttributeProto.AttributeType") -> "onnx.NodeProto":
        node = helper.make_node("Constant", [], [name])
        value = "value_ints" if kind == AttributeProto.INTS else "value_float"
        node.attribute.append(AttributeProto(name=value, type=kind, ref_attr_name=attribute))
        return node

    def constant(name: str, *values: int) -> "onnx.NodeProto":
        return helper.make_node("Constant", [], [name], value_ints=list(values))

    def part_of(name: str, number: int) -> "list[onnx.NodeProto]":
        """(B, H, N, D) in fp32."""
        gather = helper.make_node("Gather", ["heads", f"{name}_index"], [f"{name}_narrow"])
        gather.attribute.append(AttributeProto(name="axis", type=AttributeProto.INT, ref_attr_name="axis"))
        return [
            helper.make_node("Constant", [], [f"{name}_index"], value_int=number),
            gather,
            helper.make_node("Transpose", [f"{name}_narrow"], [f"{name}_first"], perm=[0, 2, 1, 3]),
            helper.make_node("Cast", [f"{name}_first"], [f"{name}_wide"], to=TensorProto.FLOAT),
        ]

    nodes = [
        from_attribute("shape", "split", AttributeProto.INTS),
        helper.make_node("Reshape", ["qkv", "shape"], ["heads"]),
    ]
    if op == STATE:
        inputs, outputs = ["qkv"], ["state"]
        nodes += [
            *part_of("k", 1),
            *part_of("v", 2),
            helper.make_node("Relu", ["k_wide"], ["k"]),
            helper.make_node("Transpose", ["k"], ["k_transposed"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["k_transposed", "v_wide"], ["sums"]),
            constant("tokens_axis", 2),
            helper.make_node("ReduceSum", ["k", "tokens_axis"], ["z"], keepdims=1),
            helper.make_node("Concat", ["sums", "z"], ["whole"], axis=2),
            helper.make_node("Unsqueeze", ["whole", "tokens_axis"], ["state"]),
        ]
    else:
        inputs, outputs = ["qkv", "state"], ["out"]
        nodes += [
            *part_of("q", 0),
            helper.make_node("Relu", ["q_wide"], ["q"]),
            constant("parts_axis", 2),
            helper.make_node("ReduceSum", ["state", "parts_axis"], ["whole"], keepdims=0),
            *(constant(name, value) for name, value in (("zero", 0), ("last", -1), ("end", 2**31 - 1))),
            helper.make_node("Slice", ["whole", "zero", "last", "parts_axis"], ["sums"]),
            helper.make_node("Slice", ["whole", "last", "end", "parts_axis"], ["z"]),
            helper.make_node("Transpose", ["z"], ["z_transposed"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "sums"], ["top"]),
            helper.make_node("MatMul", ["q", "z_transposed"], ["bottom"]),
            from_attribute("eps", "eps", AttributeProto.FLOAT),
            helper.make_node("Add", ["bottom", "eps"], ["bottom_eps"]),
            helper.make_node("Div", ["top", "bottom_eps"], ["out_first"]),
            helper.make_node("Transpose", ["out_first"], ["out_heads"], perm=[0, 2, 1, 3]),
            constant("joined", 0, 0, -1),
            helper.make_node("Reshape", ["out_heads", "joined"], ["out_wide"]),
            helper.make_node("CastLike", ["out_wide", "qkv"], ["out"]),
        ]
    defaults: dict[str, Any] = {"axis": 2, "launch": "", "cubins": "", "plugin_version": "", "plugin_namespace": ""}
    if op == APPLY:
        defaults["eps"] = EPS
    return helper.make_function(
        DOMAIN,
        op,
        inputs,
        outputs,
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["split"],
        attribute_protos=[helper.make_attribute(name, default) for name, default in defaults.items()],
    )
