"""Causal attention of a text encoder straight from its fused QKV projection: launches, ONNX bodies and cubins of the two kernels in
plugins/causal_attention_kernels.py.

Its meaning is `causal_attention_truth` in sana_ref/attention_ops.py. Two ops, because every query needs every key before it turned:

    RotateHeads       qkv, cos, sin -> turned: the heads of q and k, each token's turned by its angles (RoPE, arXiv:2104.09864)
    CausalAttention   turned, qkv, live -> out = softmax(cap tanh(q k^T scale / cap)) v, of the keys that a query sees

Heads are read where the projection left them and written where the next projection wants them: nothing is transposed, and no score
is ever in memory. A query sees itself and the keys before it, `window` tokens at most, that are text and not padding.

A program of CausalAttention takes the queries of all heads that share a key and value head (arXiv:2305.13245): BLOCK_M rows, each a
token and one of its G heads, go through the keys BLOCK_N at a time with a running softmax (FlashAttention, arXiv:2205.14135), from
the first that the window lets the first row see to the last that the last row does. Of a head the longest come first.

Precision: angles, scores, tanh, softmax and sums in fp32; products on tensor cores, with the probabilities in v's type. Turned
heads are rounded to qkv's type, as PyTorch rounds them.

Dimensions: B texts, S tokens, H heads of queries, K of keys and values, G = H / K, D channels per head. qkv (B, S, (H + 2 K) D), q
first and v last; cos, sin (S, D / 2); turned (B, S, (H + K) D); live (B, S); out (B, S, H D).
"""

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import triton

from plugins import cubin
from plugins.causal_attention_kernels import attention_kernel, rotate_kernel
from plugins.cross_attention import Blocks
from plugins.cubin import Cubin
from plugins.launch import Output

if TYPE_CHECKING:
    import onnx
    import torch

ROTATE, ATTEND = "RotateHeads", "CausalAttention"
DOMAIN = "sana"
INPUTS = {ROTATE: ("qkv", "cos", "sin"), ATTEND: ("turned", "qkv", "live")}
LEAST = 16  # channels that a tensor core takes
MAX_HEAD_DIM = 256
ALL = 2**31 - 1  # tokens of a window that never ends


# SM 90's by measurement (H200; benchmarks/results/kernel_plans_text_h200.json): two texts of 300 tokens take 17.1 us, 18.0 with
# two steps under way; of 500 25.1, or 24.2 with 64 keys, for which Triton 3.9 spills 176 bytes a thread, not 24. Eight warps, which
# compute the scores of so few rows twice, take 22. Other GPUs' and those of narrow heads are reasoned: for 256 channels eight warps
# spill no register, and two steps under way fit where a block may have 163 KiB.
WIDE, WIDE_IN_99_KIB, WIDE_ON_90 = Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 1), Blocks(64, 32, 4, 3)
NARROW, MAX_NARROW = Blocks(64, 64, 4, 2), 64  # channels
TYPES = ("fp16", "bf16")  # engines in fp32 have standard operators: 256 channels of it do not fit into registers
ROTATE_ROWS, ROTATE_WARPS = 8, 4  # heads of a program; on an H200 within 2 % of the best for 300 and 500 tokens


def check_sizes(dtype: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raises ValueError for what there is no kernel for."""
    if dtype not in TYPES:
        raise ValueError(f"{ATTEND}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}")
    fits = num_kv_heads >= 1 and num_heads >= 1 and num_heads % num_kv_heads == 0
    if not fits or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{ATTEND}: got {num_heads} heads, {num_kv_heads} of keys, head_dim {head_dim}; expected a multiple of the latter, and "
            f"an even number to {MAX_HEAD_DIM}"
        )


def blocks(capability: int, head_dim: int) -> Blocks:
    """Of an SM such as 89. m is the same for all."""
    if head_dim <= MAX_NARROW:
        return NARROW
    if capability == 90:
        return WIDE_ON_90
    return WIDE if cubin.max_shared(capability) > cubin.MAX_SHARED else WIDE_IN_99_KIB


def _constants(op: str, capability: int, sizes: tuple[int, int, int]) -> tuple[dict[str, int], dict[str, int]]:
    """A kernel's constants, and Triton's options. sizes: H, K, D."""
    heads, kv_heads, dim = sizes
    if op == ROTATE:
        half = dim // 2
        constants = {"HEADS": heads + kv_heads, "WIDTH": (heads + 2 * kv_heads) * dim, "HALF": half}
        return constants | {"PADDED": triton.next_power_of_2(half), "ROWS": ROTATE_ROWS}, {"num_warps": ROTATE_WARPS}
    chosen = blocks(capability, dim)
    constants = {
        "H": heads,
        "K": kv_heads,
        "D": dim,
        "PADDED": max(LEAST, triton.next_power_of_2(dim)),
        "BLOCK_M": chosen.m,
        "BLOCK_N": chosen.n,
    }
    return constants, {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def launch(
    qkv: "torch.Tensor",
    cos: "torch.Tensor",
    sin: "torch.Tensor",
    live: "torch.Tensor",
    out: "torch.Tensor",
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cap: float,
    window: int | None = None,
) -> None:
    """Write the attention of qkv (B, S, (H + 2 K) D) into out (B, S, H D).

    Shapes as in the module's docstring; qkv, live and out of one dtype, fp16 or bf16, cos and sin fp32, all contiguous and on the
    current GPU. live: 0 for padding. window: None for all. Raises ValueError unless that holds, and as check_sizes does.
    """
    import torch

    head_dim = 2 * cos.shape[-1]
    fits = qkv.ndim == out.ndim == 3 and cos.shape == sin.shape == (qkv.shape[1], head_dim // 2)
    fits = fits and qkv.shape[2] == (num_heads + 2 * num_kv_heads) * head_dim and live.shape == qkv.shape[:2]
    fits = fits and out.shape == (*qkv.shape[:2], num_heads * head_dim) and qkv.dtype == live.dtype == out.dtype
    fits = fits and cos.dtype == sin.dtype == torch.float32
    tensors = (qkv, cos, sin, live, out)
    if not fits or not all(t.device == qkv.device and t.is_contiguous() for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            f"{ATTEND}: got qkv, cos, sin, live, out {seen}, {num_heads} heads, {num_kv_heads} of keys; expected "
            "(B, S, (H + 2 K) D), twice (S, D / 2) in fp32, (B, S), (B, S, H D), contiguous, the others of one dtype"
        )
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(str(qkv.dtype), str(qkv.dtype))
    check_sizes(dtype, num_heads, num_kv_heads, head_dim)
    if out.numel() == 0:
        return
    major, minor = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (9, 0)  # a CPU: Triton's interpreter
    texts, tokens = qkv.shape[:2]
    sizes = (num_heads, num_kv_heads, head_dim)
    turned = qkv.new_empty((texts, tokens, (num_heads + num_kv_heads) * head_dim))
    constants, options = _constants(ROTATE, 10 * major + minor, sizes)
    grid: tuple[int, ...] = (math.ceil(tokens * (num_heads + num_kv_heads) / ROTATE_ROWS), texts)
    rotate_kernel[grid](qkv, cos, sin, turned, tokens, **constants, **options)
    constants, options = _constants(ATTEND, 10 * major + minor, sizes)
    grid = (math.ceil(tokens * (num_heads // num_kv_heads) / constants["BLOCK_M"]), num_kv_heads, texts)
    numbers = (tokens, ALL if window is None else window, scale, cap)
    attention_kernel[grid](turned, qkv, live, out, *numbers, **constants, **options)


@functools.cache
def compile_cubin(op: str, capability: int, dtype: str, num_heads: int, num_kv_heads: int, head_dim: int) -> Cubin:
    """For ROTATE or ATTEND and an SM such as 89."""
    constants, options = _constants(op, capability, (num_heads, num_kv_heads, head_dim))
    narrow, table = f"*{dtype}", "*fp32"
    if op == ROTATE:
        kernel, tensors = rotate_kernel, {"qkv": narrow, "cos": table, "sin": table, "turned": narrow}
        numbers = {"n_tokens": "i32"}
    else:
        kernel, tensors = attention_kernel, dict.fromkeys(("turned", "qkv", "live", "out"), narrow)
        numbers = {"n_tokens": "i32", "window": "i32", "scale": "fp32", "cap": "fp32"}
    return cubin.compile_cubin(
        kernel,
        capability,
        op=op,
        signature=tensors | numbers | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=tuple(tensors),
        **options,
    )


def layout(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, dict[str, list[int]]]:
    """What the function bodies read of each op. shape: of qkv, or of turned, by heads; the others: of whose how many there are."""
    shape, in_qkv = [0, 0, -1, head_dim], [num_heads + num_kv_heads, num_kv_heads]
    grouped = [0, 0, num_kv_heads, num_heads // num_kv_heads, head_dim]
    return {
        ROTATE: {"shape": shape, "in_qkv": in_qkv},
        ATTEND: {"shape": shape, "in_qkv": in_qkv, "in_turned": [num_heads, num_kv_heads], "grouped": grouped},
    }


def compile_cubins(
    op: str,
    targets: Iterable[str],
    dtype: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    scale: float = 1.0,
    cap: float = 1.0,
    window: int = ALL,
) -> dict[str, Any]:
    """Every attribute of a node of ROTATE or ATTEND for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16" or "bf16" of all tensors but cos and sin, which are fp32. scale, cap, window: of ATTEND. Raises ValueError
    as check_sizes does. The function bodies read what layout() gives, scale, cap and window.
    """
    check_sizes(dtype, num_heads, num_kv_heads, head_dim)
    batch, tokens = ["dim", 0, 0], ["dim", 0, 1]
    inputs, width = [dtype, dtype, dtype], num_heads * head_dim
    grid: list[Any]
    args: list[list[Any]] = [["in", 0], ["in", 1], ["in", 2], ["out", 0], ["i32", tokens]]
    more: dict[str, Any] = {}
    if op == ROTATE:
        inputs[1:], width = ["fp32", "fp32"], (num_heads + num_kv_heads) * head_dim
        grid = [["ceildiv", ["mul", tokens, num_heads + num_kv_heads], ROTATE_ROWS], batch, 1]
    else:
        rows = ["mul", tokens, num_heads // num_kv_heads]
        grid = [["ceildiv", rows, blocks(cubin.CAPABILITIES[0], head_dim).m], num_kv_heads, batch]
        args += [["i32", window], ["f32", scale], ["f32", cap]]
        more = {"scale": scale, "cap": cap, "window": window}
    found = cubin.attributes(
        op,
        targets,
        lambda capability: compile_cubin(op, capability, dtype, num_heads, num_kv_heads, head_dim),
        inputs=inputs,
        outputs=[Output(type=dtype, shape=[batch, tokens, width])],
        grid=grid,
        args=args,
    )
    return layout(num_heads, num_kv_heads, head_dim)[op] | found | more


def function_body(op: str, opset: int = 20) -> "onnx.FunctionProto":
    """ROTATE or ATTEND in standard ONNX operators, for every reader that has no plugin: fp32 inside.

    Attributes as in layout(), and scale, cap and window of ATTEND, all required; the plugin's are allowed and unused. opset: of the
    standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def given(attribute: str, kind: "AttributeProto.AttributeType" = AttributeProto.INTS) -> "onnx.NodeProto":
        value = {AttributeProto.INTS: "value_ints", AttributeProto.INT: "value_int", AttributeProto.FLOAT: "value_float"}[kind]
        node = helper.make_node("Constant", [], [attribute])
        node.attribute.append(AttributeProto(name=value, type=kind, ref_attr_name=attribute))
        return node

    def numbers(name: str, *values: int) -> "onnx.NodeProto":
        return helper.make_node("Constant", [], [name], value_ints=list(values))

    def wide(name: str, perm: list[int]) -> "list[onnx.NodeProto]":
        return [
            helper.make_node("Transpose", [name], [f"{name}_first"], perm=perm),
            helper.make_node("Cast", [f"{name}_first"], [f"{name}_wide"], to=TensorProto.FLOAT),
        ]

    nodes = [
        given("shape"),
        given("in_qkv"),
        numbers("one", 1),
        numbers("joined", 0, 0, -1),
        helper.make_node("Reshape", ["qkv", "shape"], ["heads"]),
        helper.make_node("Split", ["heads", "in_qkv"], ["not_turned", "v"], axis=2),
    ]
    if op == ROTATE:
        attributes = ["shape", "in_qkv"]
        nodes += [
            helper.make_node("Cast", ["not_turned"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Split", ["wide"], ["low", "high"], axis=-1, num_outputs=2),
            helper.make_node("Unsqueeze", ["cos", "one"], ["c"]),
            helper.make_node("Unsqueeze", ["sin", "one"], ["s"]),
            *(helper.make_node("Mul", [half, table], [f"{half}_{table}"]) for half in ("low", "high") for table in ("c", "s")),
            helper.make_node("Sub", ["low_c", "high_s"], ["turned_low"]),
            helper.make_node("Add", ["high_c", "low_s"], ["turned_high"]),
            helper.make_node("Concat", ["turned_low", "turned_high"], ["turned_heads"], axis=-1),
            helper.make_node("Reshape", ["turned_heads", "joined"], ["out_wide"]),
            helper.make_node("CastLike", ["out_wide", "qkv"], ["turned"]),
        ]
    else:
        attributes = ["shape", "in_qkv", "in_turned", "grouped", "scale", "cap", "window"]
        scalars = (("scale", AttributeProto.FLOAT), ("cap", AttributeProto.FLOAT), ("window", AttributeProto.INT))
        nodes += [
            given("in_turned"),
            given("grouped"),
            *(given(name, kind) for name, kind in scalars),
            numbers("two", 2),
            helper.make_node("Reshape", ["turned", "shape"], ["turned_heads"]),
            helper.make_node("Split", ["turned_heads", "in_turned"], ["q_heads", "k"], axis=2),
            helper.make_node("Reshape", ["q_heads", "grouped"], ["q"]),
            *wide("q", [0, 2, 3, 1, 4]),  # (B, K, G, S, D)
            *wide("k", [0, 2, 3, 1]),
            *wide("v", [0, 2, 1, 3]),
            helper.make_node("Unsqueeze", ["k_wide", "two"], ["k_shared"]),
            helper.make_node("Unsqueeze", ["v_wide", "two"], ["v_shared"]),
            helper.make_node("MatMul", ["q_wide", "k_shared"], ["products"]),
            helper.make_node("Mul", ["products", "scale"], ["scaled"]),
            helper.make_node("Div", ["scaled", "cap"], ["small"]),
            helper.make_node("Tanh", ["small"], ["bent"]),
            helper.make_node("Mul", ["bent", "cap"], ["scores"]),
            # Who is seen: (B, 1, 1, S, S)
            helper.make_node("Constant", [], ["from"], value_int=0),
            helper.make_node("Constant", [], ["step"], value_int=1),
            helper.make_node("Shape", ["live"], ["live_shape"]),
            helper.make_node("Gather", ["live_shape", "step"], ["count"]),
            helper.make_node("Range", ["from", "count", "step"], ["position"]),
            helper.make_node("Unsqueeze", ["position", "one"], ["query"]),
            helper.make_node("Sub", ["query", "position"], ["back"]),
            helper.make_node("GreaterOrEqual", ["back", "from"], ["before"]),
            helper.make_node("Less", ["back", "window"], ["near"]),
            helper.make_node("And", ["before", "near"], ["in_window"]),
            helper.make_node("Cast", ["live"], ["text"], to=TensorProto.BOOL),
            numbers("others", 1, 2, 3),
            helper.make_node("Unsqueeze", ["text", "others"], ["text_rows"]),
            helper.make_node("And", ["in_window", "text_rows"], ["seen"]),
            helper.make_node("Constant", [], ["blocked"], value_float=-3.4e38),
            helper.make_node("Where", ["seen", "scores", "blocked"], ["masked"]),
            helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
            helper.make_node("Cast", ["seen"], ["seen_wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["weights", "seen_wide"], ["probabilities"]),  # what sees nothing is 0
            helper.make_node("MatMul", ["probabilities", "v_shared"], ["out_first"]),
            helper.make_node("Transpose", ["out_first"], ["out_groups"], perm=[0, 3, 1, 2, 4]),
            helper.make_node("Reshape", ["out_groups", "joined"], ["out_wide"]),
            helper.make_node("CastLike", ["out_wide", "qkv"], ["out"]),
        ]
    defaults = ("launch", "cubins", "plugin_version", "plugin_namespace")
    return helper.make_function(
        DOMAIN,
        op,
        list(INPUTS[op]),
        ["turned" if op == ROTATE else "out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=attributes,
        attribute_protos=[helper.make_attribute(name, "") for name in defaults],
    )
