"""Softmax attention to the text, straight from where its inputs lie: a Triton kernel, its ONNX function body, its cubins.

Its meaning is `cross_attention_truth` in sana_ref/attention_ops.py: out = softmax(q k^T D**-0.5 + bias) v, with q as its projection
leaves it and k and v inside the text projection's whole outputs. Nothing is scaled, cut out or transposed before the kernel, and
nothing joined after it.

A program takes BLOCK_M tokens of one head of one picture through the keys, BLOCK_N at a time, with a running softmax
(FlashAttention, arXiv:2205.14135). Its blocks are powers of two: the 72 channels of a head of Sana-0.6B are 64 and 16, not 128.
A text is short and padded to 300 keys, so the loop ends behind the last key that can count. A key as far below the best as padding
is adds exactly nothing, so the result is the whole loop's to the last bit.

Where a product in 8 bits follows, a build for TensorRT gives a node an `out_scale`, known before (plugins/static_scale.py): it
then gives (kB, N, H D) in 8 bits. A row's own largest number would need all heads.

Precision: scores, softmax and sums in fp32; products of half-precision inputs on tensor cores, with the probabilities in v's type.

Dimensions: k texts of B pictures, kB together; H heads, N tokens, L keys, D channels per head. q, out (kB, N, H D); keys, values
(blocks, k, B, H, L, D); bias (kB, L). In the kernel the first FIRST_D of D channels, and E for the REST_D that may follow.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.static_scale import OutKind, as_output, check_outputs, output_kinds, quantized_outputs

if TYPE_CHECKING:
    import onnx
    import torch

    from plugins.static_scale import Quantized

OP = "CrossAttention"
DOMAIN = "sana"
LEAST = 16  # channels that a tensor core takes
MAX_HEAD_DIM = 128  # of 256 channels neither keys and values of two steps nor the sums would fit
# A key whose bias is this far below the highest of its text counts for nothing: exp of -104 is 0 in fp32, so the scores of two keys
# would have to differ by 4896. Padding has -10000, half of which leaves as much room for scores as for a bias that is meant.
# Without any live key all have the same bias, so that all count, as in the truth.
FAR = 5000.0
LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e38)  # where the running maximum starts: a number, so that a step in which every bias is -inf is no NaN


@dataclass(frozen=True)
class Blocks:
    """m tokens of a program, n keys of a step, the program's warps, and how many steps' loads are under way."""

    m: int
    n: int
    num_warps: int
    num_stages: int


# Measured in fp16 on an H200: of heads of 112 channels (Sana-1.6B) with 1024 to 16,384 tokens; of 72 (Sana-0.6B) with 1024, where
# 300 live keys take 16.2 us instead of 20.3 in one part, and 40 take 7.4 instead of 7.9.
WHOLE, IN_PARTS = Blocks(64, 32, 4, 2), Blocks(128, 64, 4, 1)
# Reasoned: tensor cores that read nothing from shared memory leave too few registers for 64 keys.
NARROW_PARTS = Blocks(128, 32, 8, 1)
FP32 = Blocks(32, 32, 4, 2)  # reasoned: it has no tensor cores, and its sums leave few registers


@triton.jit
def _part(rows, at, live, channels, D: tl.constexpr):
    """Channels of rows that begin at `at`, both (rows, 1) with `live`."""
    return tl.load(rows + at + channels[None, :], mask=live & (channels < D)[None, :], other=0.0)


@triton.jit
def kernel(
    q,
    keys,
    values,
    bias,
    out,
    out_scales,
    n_tokens,
    n_keys,
    block,
    out_scale,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    FAR: tl.constexpr,
    FIRST_D: tl.constexpr,
    REST_D: tl.constexpr,
    PADDED_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out_scale: None, or out is in 8 bits; out_scales: None, or it has scales."""
    first, head, picture = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    heads, pictures = tl.num_programs(1), tl.num_programs(2)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, FIRST_D)
    tokens = (picture.to(tl.int64) * n_tokens + first) * heads * D + head * D  # int64: 64 pictures of 4096 px pass 2**31 elements
    at_M, live_M = m[:, None] * (heads * D), (first + m < n_tokens)[:, None]
    q_MD = _part(q + tokens, at_M, live_M, d, D)
    if REST_D:
        e = FIRST_D + tl.arange(0, REST_D)
        q_ME = _part(q + tokens, at_M, live_M, e, D)
        rest_ME = tl.zeros((BLOCK_M, REST_D), tl.float32)

    text = ((block * pictures + picture).to(tl.int64) * heads + head) * n_keys * D
    bias += picture.to(tl.int64) * n_keys
    every_L = tl.arange(0, PADDED_L)
    bias_L = tl.load(bias + every_L, mask=every_L < n_keys, other=float("-inf")).to(tl.float32)
    best = tl.max(bias_L, axis=0)  # taken off each bias: softmax stays the same, and fp32 keeps the scores' digits beside -10000
    end = tl.max(tl.where(bias_L > best - FAR, every_L + 1, 0), axis=0)

    top_M = tl.full((BLOCK_M,), LOWEST, tl.float32)
    sum_M, out_MD = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, FIRST_D), tl.float32)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at_N, live_N = n[:, None] * D, (n < n_keys)[:, None]
        # All first: with the rest's loads behind the first's products, the ptxas of Triton 3.6 made code for sm_90 that reads
        # beside its shared memory (128 tokens, 64 keys, one stage).
        k_ND = _part(keys + text, at_N, live_N, d, D)
        v_ND = _part(values + text, at_N, live_N, d, D)
        if REST_D:
            k_NE = _part(keys + text, at_N, live_N, e, D)
            v_NE = _part(values + text, at_N, live_N, e, D)
        bias_N = tl.load(bias + n, mask=n < n_keys, other=float("-inf")).to(tl.float32) - best
        # ieee: for fp32 inputs; the default, TF32, has 10 bits of mantissa. Half precision products are exact in fp32 anyway.
        products_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if REST_D:
            products_MN = tl.dot(q_ME, tl.trans(k_NE), products_MN, input_precision="ieee")
        scores_MN = products_MN * (SCALE * LOG2E) + (bias_N * LOG2E)[None, :]
        new_top_M = tl.maximum(top_M, tl.max(scores_MN, axis=1))
        p_MN, shrink_M = tl.exp2(scores_MN - new_top_M[:, None]), tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, axis=1)
        p_MN = p_MN.to(v_ND.dtype)
        out_MD = tl.dot(p_MN, v_ND, out_MD * shrink_M[:, None], input_precision="ieee")
        if REST_D:
            rest_ME = tl.dot(p_MN, v_NE, rest_ME * shrink_M[:, None], input_precision="ieee")
        top_M = new_top_M
    if out_scale is None:
        factor_M = tl.div_rn(1.0, sum_M)  # as in plugins/qkv_linear_attention.py
    else:
        factor_M = 1.0 / (sum_M * out_scale)
    if out_scales is not None:
        if head == 0:
            scales = out_scales + picture.to(tl.int64) * n_tokens + first
            tl.store(scales + m, tl.full((BLOCK_M,), 0.0, tl.float32) + out_scale, mask=first + m < n_tokens)
    _store(out + tokens, at_M, live_M, d, out_MD * factor_M[:, None], out_scales, D)
    if REST_D:
        _store(out + tokens, at_M, live_M, e, rest_ME * factor_M[:, None], out_scales, D)


@triton.jit
def _store(rows, at, live, channels, x, out_scales, D: tl.constexpr):
    x = as_output(x, rows, out_scales)
    tl.store(rows + at + channels[None, :], x, mask=live & (channels < D)[None, :])


def blocks(capability: int, dtype: str, head_dim: int) -> Blocks:
    """Of an SM such as 89. m is the same for all."""
    if dtype == "fp32":
        return FP32
    if not parts(head_dim)[1]:
        return WHOLE
    return IN_PARTS if 90 <= capability < 120 else NARROW_PARTS


def plan(capability: int, dtype: str, n_keys: int, head_dim: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constants, and Triton's options. Raises ValueError for what it has no blocks for."""
    cubin.check_type(OP, dtype)
    if not 1 <= head_dim <= MAX_HEAD_DIM or n_keys < 1:
        raise ValueError(f"{OP}: got {n_keys} keys, head_dim {head_dim}; expected 1 or more, and 1 to {MAX_HEAD_DIM}")
    first, rest = parts(head_dim)
    chosen = blocks(capability, dtype, head_dim)
    constants = {
        "D": head_dim,
        "SCALE": head_dim**-0.5,
        "FAR": FAR,
        "FIRST_D": first,
        "REST_D": rest,
        "PADDED_L": triton.next_power_of_2(n_keys),
        "BLOCK_M": chosen.m,
        "BLOCK_N": chosen.n,
    }
    return constants, {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def parts(head_dim: int) -> tuple[int, int]:
    """The blocks that a head's channels are in: one of all, and 0; or two, where that is a quarter less at least."""
    whole = max(LEAST, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(LEAST, triton.next_power_of_2(max(1, head_dim - first)))
    return (first, rest) if first >= LEAST and first + rest <= whole * 3 // 4 else (whole, 0)


def launch(
    q: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    bias: "torch.Tensor",
    out: "torch.Tensor",
    block: int,
    quantized: "Quantized | None" = None,
) -> None:
    """Write the attention of q (kB, N, H D) to a block's keys and values into out: contiguous, one dtype, on the current GPU.

    Shapes as in the module's docstring; fp16, bf16 or fp32. quantized: out is in 8 bits; also write these scales, if any. Raises
    ValueError unless that holds and D is at most MAX_HEAD_DIM.
    """
    tensors = (q, keys, values, bias, out)
    fits = q.ndim == 3 and keys.ndim == 6 and keys.shape == values.shape and out.shape == q.shape and 0 <= block < keys.shape[0]
    if fits:
        _, texts, batch, heads, n_keys, head_dim = keys.shape
        fits = (q.shape[0], q.shape[2]) == (texts * batch, heads * head_dim) and bias.shape == (texts * batch, n_keys)
    alike = all(t.device == q.device and t.is_contiguous() for t in tensors)
    alike = alike and all(t.dtype == q.dtype for t in (tensors[:-1] if quantized else tensors))
    check_outputs(OP, out, quantized)
    if not fits or not alike:
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            f"{OP}: got q, keys, values, bias, out {seen}, block {block}; expected (kB, N, H D), twice (blocks, k, B, H, L, D), "
            "(kB, L), (kB, N, H D), contiguous, of one dtype"
        )
    import torch

    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(q.dtype), str(q.dtype))
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)  # a CPU: Triton's interpreter
    constants, options = plan(10 * major + minor, dtype, n_keys, head_dim)
    if out.numel() == 0:
        return
    grid = (math.ceil(q.shape[1] / constants["BLOCK_M"]), heads, texts * batch)
    scales, scale = quantized or (None, None)
    numbers = (q.shape[1], n_keys, block, scale)
    kernel[grid](q, keys, values, bias, out, scales, *numbers, **constants, **options)


@functools.cache
def compile_cubin(capability: int, dtype: str, n_keys: int, head_dim: int, quantized: OutKind | None = None) -> Cubin:
    """For an SM such as 89. n_keys: L. Raises ValueError for one that has no fp8, if that is asked for."""
    sizes, options = plan(capability, dtype, n_keys, head_dim)
    kinds, constants = output_kinds(OP, capability, dtype, quantized)
    tensors = dict.fromkeys(("q", "keys", "values", "bias"), f"*{dtype}")
    numbers = dict.fromkeys(("n_tokens", "n_keys", "block"), "i32")
    outputs = {name: kinds[name] for name in ("out", "out_scales")}
    return cubin.compile_cubin(
        kernel,
        capability,
        op=OP,
        signature=tensors | outputs | numbers | {"out_scale": kinds["out_scale"]} | dict.fromkeys(sizes, "constexpr"),
        constants=sizes | constants,
        aligned=(*tensors, *outputs),
        **options,
    )


def compile_cubins(
    targets: Iterable[str],
    dtype: str,
    *,
    heads: int,
    n_keys: int,
    head_dim: int,
    block: int,
    out_scale: float | None = None,
    out_kind: OutKind = "fp8",
) -> dict[str, str | bytes | int]:
    """Every attribute of a node for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of all tensors; n_keys: L, which a graph has to fix. out_scale, out_kind: of bits, where they are
    the output. Raises ValueError where `plan` does. The function body reads `block`.
    """
    constants, _ = plan(cubin.CAPABILITIES[0], dtype, n_keys, head_dim)  # raises for what there is no kernel for
    kind = out_kind if out_scale is not None else None
    outputs, more_args, last_args = quantized_outputs(dtype, [["dim", 0, 0], ["dim", 0, 1]], heads * head_dim, out_scale, kind)
    pictures, tokens = ["dim", 0, 0], ["dim", 0, 1]
    found = cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, n_keys, head_dim, kind),
        inputs=[dtype] * 4,
        outputs=outputs,
        grid=[["ceildiv", tokens, constants["BLOCK_M"]], heads, pictures],
        args=[
            *(["in", i] for i in range(4)),
            *more_args,
            *(["i32", number] for number in (tokens, n_keys, block)),
            *last_args,
        ],
    )
    return found | {"block": block}


def function_body(opset: int = 20) -> "onnx.FunctionProto":
    """The op in standard ONNX operators, for every reader that has no plugin: fp32 inside.

    Attribute `block` (required): which block's keys and values are read; the plugin's attributes are allowed and unused. opset: of
    the standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    block = helper.make_node("Constant", [], ["block"])
    block.attribute.append(AttributeProto(name="value_int", type=AttributeProto.INT, ref_attr_name="block"))

    def constant(name: str, *values: int) -> "onnx.NodeProto":
        return helper.make_node("Constant", [], [name], value_ints=list(values))

    def text(source: str) -> "list[onnx.NodeProto]":
        """(kB, H, L, D) in fp32."""
        return [
            helper.make_node("Gather", [source, "block"], [f"{source}_block"], axis=0),
            helper.make_node("Reshape", [f"{source}_block", "text_shape"], [f"{source}_narrow"]),
            helper.make_node("Cast", [f"{source}_narrow"], [f"{source}_wide"], to=TensorProto.FLOAT),
        ]

    nodes = [
        block,
        constant("any", -1),
        constant("stay", 0, 0),
        constant("bias_axes", 1, 2),
        helper.make_node("Shape", ["keys"], ["heads_keys_dim"], start=3),
        helper.make_node("Shape", ["keys"], ["heads"], start=3, end=4),
        helper.make_node("Shape", ["keys"], ["dim"], start=5),
        helper.make_node("Concat", ["any", "heads_keys_dim"], ["text_shape"], axis=0),
        helper.make_node("Concat", ["stay", "heads", "dim"], ["q_shape"], axis=0),
        helper.make_node("Concat", ["stay", "any"], ["joined"], axis=0),
        *text("keys"),
        *text("values"),
        helper.make_node("Transpose", ["keys_wide"], ["keys_transposed"], perm=[0, 1, 3, 2]),
        helper.make_node("Reshape", ["q", "q_shape"], ["q_heads"]),
        helper.make_node("Transpose", ["q_heads"], ["q_first"], perm=[0, 2, 1, 3]),
        helper.make_node("Cast", ["q_first"], ["q_wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["dim"], ["dim_wide"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["dim_wide"], ["root"]),
        helper.make_node("Div", ["q_wide", "root"], ["q_scaled"]),
        helper.make_node("MatMul", ["q_scaled", "keys_transposed"], ["products"]),
        helper.make_node("Cast", ["bias"], ["bias_wide"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["bias_wide", "bias_axes"], ["bias_rows"]),
        helper.make_node("Add", ["products", "bias_rows"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
        helper.make_node("MatMul", ["probabilities", "values_wide"], ["out_first"]),
        helper.make_node("Transpose", ["out_first"], ["out_heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["out_heads", "joined"], ["out_wide"]),
        helper.make_node("CastLike", ["out_wide", "q"], ["out"]),
    ]
    defaults = ("launch", "cubins", "plugin_version", "plugin_namespace")
    return helper.make_function(
        DOMAIN,
        OP,
        ["q", "keys", "values", "bias"],
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["block"],
        attribute_protos=[helper.make_attribute(name, "") for name in defaults],
    )
