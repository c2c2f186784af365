"""ReLU linear attention straight from a fused QKV projection, split over tokens: launches, ONNX bodies and cubins of the two
kernels in plugins/qkv_linear_attention_kernels.py.

Its meaning is `qkv_linear_attention_truth` in sana_ref/ops.py. Two ops, because every output needs the sums over all tokens:

    LinearAttentionState    qkv -> state: S = relu(k)^T v and z = the sum of relu(k), in parts, each over some of the tokens
    LinearAttentionApply    qkv, state -> out = relu(q) S / (relu(q) z + eps)

Heads are read where the projection left them and written where the next projection wants them: nothing is transposed in between.
The number of parts grows with the tokens, so that 4K (16,384 tokens) fills a GPU as 1K does; they are added up in a fixed order.

Where a product in 8 bits follows, a build for TensorRT gives an Apply an `out_scale` (plugins/static_scale.py).

For video S is of keys that a rotary embedding turned, and meets queries turned alike; z, and what it meets, is not turned, so that
the divisor stays positive. No image model has that: it is an option of `launch` and `compile_cubin`, and no node has it yet.

Precision: the sums and the division in fp32. S meets q on tensor cores: with bf16 inputs as two bf16 numbers (16 bits); with fp16
ones in TF32, rounded to the 11 bits that q and out have. That errs 1.12 times as much as fp32 does (root mean square over random
tokens, whose outputs are rounded to fp16). Three TF32 products, which stand for one of fp32, take 13.2 us on an H200 for 2048
tokens of 70 heads to FP8, one 9.2; of 36 heads 8.6 and 6.8. Turned by a rotary embedding, k meets v in TF32, and S meets q as two
bf16 numbers of each (`precision`).

Dimensions: B images, H heads, N tokens, D channels per head, P parts. qkv (B, N, 3, H, D) as a transformer's projection, or
interleaved, (B, N, H, 3, D), as DC-AE's; state (B, H, P, D + 1, D), z last; out (B, N, H, D).
"""

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import triton

from plugins import cubin
from plugins.cubin import Cubin
from plugins.launch import Output
from plugins.qkv_linear_attention_kernels import apply_kernel, state_kernel
from plugins.static_scale import OutKind, check_outputs, output_kinds, quantized_outputs

if TYPE_CHECKING:
    import onnx
    import torch

    from plugins.static_scale import Quantized

STATE, APPLY = "LinearAttentionState", "LinearAttentionApply"
DOMAIN = "sana"
EPS = 1e-15  # as sana_ref.ops.EPS; a test holds the two together
HEAD_DIMS = (16, 32, 64, 112)  # 16: the least that a tensor core takes; the published image models have 32, video has 112
PRECISIONS = {"bf16": "split", "fp16": "tf32", "fp32": "ieee"}  # of the product with S
# Tokens a step, warps of a program, loads under way: measured on an H200 with the heads of Sana-1.6B, as are the parts. One warp a
# program of State: 0.008 ms where four took 0.017 (1024 px). fp32 and wide heads have more registers and so smaller steps there.
PLANS = {STATE: (64, 1, 1), APPLY: (64, 4, 1)}
SMALL_STATE = (32, 1, 3)
WIDE = (32, 8, 1)  # for heads of 112 channels; reasoned, not measured. In fp32 Apply's S does not fit into registers
PART, LONG_PART = 128, 512  # tokens of a part of the state: the shorter until there are PARTS, then the longer
PARTS, MAX_PARTS = 8, 16  # each program of Apply reads them all
LEAST_BLOCKS, MOST_BLOCKS = 4, 8  # of a program of Apply, each of whom reads all parts: 140 us with 4 of 16384 tokens, 118 with 8
TOKENS_A_BLOCK = 2048  # in between


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
    chosen = WIDE if head_dim > 64 else SMALL_STATE if op == STATE and (dtype == "fp32" or head_dim > 32) else PLANS[op]
    return dict(zip(("BLOCK_N", "num_warps", "num_stages"), chosen, strict=True))


def precision(dtype: str, rotary: bool) -> str:
    """Of products in fp32. rotary: k has to become TF32 for that with v; q and S, of whose products rotated ones cancel each other,
    are split, or fp16 would err 2.3 times as much as rounding its results does (the largest of 4096 tokens, 70 heads)."""
    return "split" if rotary and dtype != "fp32" else PRECISIONS[dtype]


def launch(
    qkv: "torch.Tensor",
    out: "torch.Tensor",
    num_heads: int,
    eps: float = EPS,
    *,
    interleaved: bool = False,
    rotary: "torch.Tensor | None" = None,
    quantized: "Quantized | None" = None,
) -> None:
    """Write the attention of qkv (B, N, 3 H D) into out (B, N, H D): contiguous, one dtype of fp16, bf16, fp32, on the current GPU.

    rotary: cosines, then sines, of a token's angles, (2, N, D / 2) in fp32, contiguous. quantized: out is in 8 bits; also write
    these scales, if any. Raises ValueError unless that holds and D is in HEAD_DIMS.
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
    if rotary is not None:
        seen, wanted = (tuple(rotary.shape), str(rotary.dtype), rotary.device), (2, tokens, head_dim // 2)
        if seen != (wanted, "torch.float32", qkv.device) or not rotary.is_contiguous():
            raise ValueError(
                f"{APPLY}: got rotary {seen}, strides {rotary.stride()}; expected {wanted} fp32, contiguous, beside qkv"
            )
    if out.numel() == 0:
        return
    parts = num_parts(tokens)
    n_part = _part(tokens, parts)
    state = qkv.new_empty((batch, num_heads, parts, head_dim + 1, head_dim), dtype=torch.float32)
    options = {"INTERLEAVED": interleaved, "PRECISION": precision(dtype, rotary is not None)}
    options |= {"D": head_dim, "PADDED": triton.next_power_of_2(head_dim)}
    state_kernel[batch * num_heads, parts](qkv, rotary, state, num_heads, tokens, n_part, **options, **plan(STATE, dtype, head_dim))
    scales, scale = quantized or (None, None)
    n_tile = tile(tokens)
    apply_kernel[batch * num_heads, math.ceil(tokens / n_tile)](
        qkv,
        rotary,
        state,
        out,
        scales,
        num_heads,
        tokens,
        n_tile,
        parts,
        eps,
        scale,
        **options,
        **plan(APPLY, dtype, head_dim),
    )


def layout(heads: int, head_dim: int, *, interleaved: bool) -> dict[str, Any]:
    """How a node reads a row of qkv. split: the shape of qkv with 0 for what stays; axis: that of q, k and v in it."""
    return {"split": [0, 0, heads, 3, head_dim], "axis": 3} if interleaved else {"split": [0, 0, 3, heads, head_dim], "axis": 2}


@functools.cache
def compile_cubin(
    op: str, capability: int, dtype: str, head_dim: int, interleaved: bool, quantized: OutKind | None = None, rotary: bool = False
) -> Cubin:
    """For STATE or APPLY and an SM such as 89. Raises ValueError for one that has no fp8, if that is asked for."""
    chosen = plan(op, dtype, head_dim)
    constants: dict[str, Any] = {"D": head_dim, "PADDED": triton.next_power_of_2(head_dim), "BLOCK_N": chosen["BLOCK_N"]}
    constants |= {"INTERLEAVED": interleaved, "PRECISION": precision(dtype, rotary)}
    signature = {"qkv": f"*{dtype}", "rotary": "*fp32" if rotary else "constexpr", "state": "*fp32"}
    if not rotary:
        constants["rotary"] = None
    if op == STATE:
        kernel, signature = state_kernel, signature | dict.fromkeys(("heads", "n_tokens", "n_part"), "i32")
    else:
        kinds, absent = output_kinds(op, capability, dtype, quantized)
        numbers = dict.fromkeys(("heads", "n_tokens", "n_tile", "parts"), "i32") | {"eps": "fp32"}
        outputs = {name: kinds[name] for name in ("out", "out_scales")}
        kernel, signature = apply_kernel, signature | outputs | numbers | {"out_scale": kinds["out_scale"]}
        constants |= absent
    return cubin.compile_cubin(
        kernel,
        capability,
        op=op,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=("qkv", "rotary", "state", "out", "out_scales"),
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
