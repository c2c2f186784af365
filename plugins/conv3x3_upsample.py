"""A 3x3 convolution whose channels become 2x2 pixels, with the shortcut of such a step: Triton kernel, ONNX body, cubins.

Its meaning is in sana_ref/conv_ops.py, with (i, j) a pixel's place among the 2x2:

    Conv3x3Upsample    y[2r + i, 2c + j, n] = conv(x)[r, c, (i, j, n)] + bias[(i, j, n)] + x[r, c, (4n + 2i + j) // repeats]

The sum is that of plugins/conv3x3.py. Only the end differs: each element's address is computed from its i, j and n, so that nothing
is transposed in memory, and the shortcut reads channels of pixels that the sum has just read, mostly from a cache. Operator by
operator, those steps read and write the picture of twice the sides, the largest of a stage, several times.

Rows of weight are ordered (i, j, n), unlike F.pixel_shuffle's (n, i, j): neighbouring columns of a block are then neighbours in y.
Weights are constants, so their order costs nothing.

A convolution of a picture whose pixels were repeated 2x2 (`nearest`) is such a step as well: at each corner, pixels of the small
picture meet the sums of the weights that meet their repeats, four taps of nine (sana_ref/fused_decoder.py). The kernel leaves out
the other five, whose weights are zero.

Precision: all in fp32, rounded once.

Dimensions: B pictures, h x w pixels, C channels in, N out. x (B, h, w, C), weight (4N, 3, 3, C), bias (4N,), y (B, 2h, 2w, N). In a
program M pixels of x, Q of the 4N columns.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins import conv3x3, cubin
from plugins.conv3x3 import Plan
from plugins.conv3x3_kernels import block_of, convolved, row_of
from plugins.cubin import Cubin
from plugins.launch import Output

if TYPE_CHECKING:
    import onnx
    import torch

OP = "Conv3x3Upsample"
DOMAIN = "sana"
INPUTS = ("x", "weight", "bias")
CORNERS = 4  # pixels of y for one of x


@triton.jit
def repeated(x, first, corner_Q, n_Q, live_MQ, C: tl.constexpr, REPEATS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(M, Q): channels (4n + corner) // REPEATS of pixels from element `first` on.

    As it is written, each is a load of 2 bytes, which took longer than the sum: 0.65 of 1.16 ms for 512 px, 256 channels, H200.
    """
    m_M = tl.arange(0, BLOCK_M)
    if REPEATS == 2:
        # 2n or 2n + 1, in one word of the double width: neighbours in y are neighbours in words, and loads have 16 bytes.
        BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
        word: tl.constexpr = tl.int32 if BITS == 16 else tl.int64
        half: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
        words = (x + first).to(tl.pointer_type(word))
        words_MQ = tl.load(words + (m_M[:, None] * (C // 2) + n_Q[None, :]), mask=live_MQ, other=0)
        return (words_MQ >> (corner_Q // 2 * BITS).to(word)[None, :]).to(half).to(x.dtype.element_ty, bitcast=True)
    else:
        if REPEATS % 4 == 0:
            from_Q = n_Q // (REPEATS // 4)  # the same, and shows that neighbours in y are neighbours in x
        else:
            from_Q = (4 * n_Q + corner_Q) // REPEATS
        return tl.load(x + first + (m_M[:, None] * C + from_Q[None, :]), mask=live_MQ, other=0.0)


@triton.jit
def kernel(
    x,
    weight,
    bias,
    y,
    height,
    width,
    C: tl.constexpr,
    N: tl.constexpr,
    REPEATS: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program: M pixels of a picture, Q columns of the product. REPEATS: 0 without the shortcut. NEAREST: Q is in one corner."""
    picture = tl.program_id(1)
    start, first_column = block_of(height * width, 4 * N, BLOCK_M, BLOCK_N, GROUP_M)
    q_Q = first_column + tl.arange(0, BLOCK_N)
    pixel_M = start + tl.arange(0, BLOCK_M)
    live_MQ = (pixel_M < height * width)[:, None] & (q_Q < 4 * N)[None, :]
    corner_Q, n_Q = q_Q // N, q_Q % N
    # Bias and shortcut come first: behind the sum, whose registers are half of all, the shortcut's would not fit (SM 90).
    sums_MQ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + row_of(bias, q_Q, 4 * N)
    if REPEATS:
        first = (picture.to(tl.int64) * height * width + start) * C  # int64 as in `convolved`
        sums_MQ += repeated(x, first, corner_Q, n_Q, live_MQ, C, REPEATS, BLOCK_M).to(tl.float32)
    sums_MQ = convolved(
        sums_MQ, x, weight, picture, start, q_Q, height, width, C, 4 * N, BLOCK_M, BLOCK_N, BLOCK_K, NEAREST, first_column // N
    )
    # From the first of the program's rows on 32 bits do: 128 pixels are at most 128 rows, and few of those if they are long.
    first_row = start // width
    y += (picture.to(tl.int64) * height + first_row) * (4 * N) * width
    row_M, column_M = pixel_M // width - first_row, pixel_M % width
    pixel_at_M, corner_at_Q = (row_M * 4 * width + 2 * column_M) * N, (corner_Q // 2 * 2 * width + corner_Q % 2) * N + n_Q
    tl.store(y + (pixel_at_M[:, None] + corner_at_Q[None, :]), sums_MQ.to(y.dtype.element_ty), mask=live_MQ)


def plan(capability: int, dtype: str, channels: int, outputs: int, repeats: int, nearest: bool) -> Plan:
    """For an SM such as 89, C and N: that of Conv3x3 for 4N channels out; of `nearest`, whose programs are in one corner, for N. Of
    128 x 128 sums, behind which more is to be done here, programs have eight warps: 0.56 ms, not 0.61, for 512 px and 256 channels
    (H200; benchmarks/results/kernel_plans_h200.json).

    Raises ValueError as plugins.conv3x3.plan does, and unless `repeats` is 0 or makes 4N channels of C.
    """
    if repeats and repeats * channels != CORNERS * outputs:
        raise ValueError(
            f"{OP}: got {channels} channels in, {outputs} out, {repeats} repeats; expected in x repeats = {CORNERS} x out, or "
            "0 repeats for no shortcut"
        )
    chosen = conv3x3.plan(OP, capability, dtype, channels, _power_of_two(outputs) if nearest else CORNERS * outputs)
    return replace(chosen, num_warps=8) if chosen.block_m * chosen.block_n == conv3x3.WIDE else chosen


def _power_of_two(outputs: int) -> int:
    """The largest that divides N, so that blocks of that many columns do not reach from corner to corner."""
    return outputs & -outputs


def _constants(chosen: Plan, channels: int, outputs: int, repeats: int, nearest: bool) -> dict[str, int]:
    nearest = nearest and outputs % chosen.block_n == 0  # else all taps are added up, of which five are zero
    blocks = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "GROUP_M": conv3x3.GROUP_M}
    return {"C": channels, "N": outputs, "REPEATS": repeats, "NEAREST": nearest} | blocks


def launch(
    x: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor",
    y: "torch.Tensor",
    repeats: int = 0,
    nearest: bool = False,
) -> None:
    """Write the op's result into y (B, 2h, 2w, N). All contiguous, one dtype of fp16, bf16, fp32, on the current GPU.

    Raises ValueError unless that holds, the shapes fit, and repeats is as `plan` asks.
    """
    import torch

    batch, height, width, channels = x.shape
    outputs = y.shape[-1]
    fits = weight.shape == (CORNERS * outputs, 3, 3, channels) and bias.shape == (CORNERS * outputs,)
    fits = fits and y.shape == (batch, 2 * height, 2 * width, outputs)
    inputs = (x, weight, bias)
    if not fits or not all(t.is_contiguous() and t.dtype == y.dtype and t.device == y.device for t in (*inputs, y)):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in (*inputs, y))
        raise ValueError(
            f"{OP}: got x, weight, bias, y {seen}; expected x (B, h, w, C), weight (4N, 3, 3, C), bias (4N,), y (B, 2h, 2w, N), "
            "all contiguous, of one dtype and device"
        )
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(y.dtype), str(y.dtype))
    major, minor = torch.cuda.get_device_capability(y.device) if y.is_cuda else (8, 0)  # a CPU: Triton's interpreter
    chosen = plan(10 * major + minor, dtype, channels, outputs, repeats, nearest)
    if y.numel() == 0:
        return
    programs = chosen.programs(OP, height * width, CORNERS * outputs), batch
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    kernel[programs](*inputs, y, height, width, **_constants(chosen, channels, outputs, repeats, nearest), **options)


@functools.cache
def compile_cubin(capability: int, dtype: str, channels: int, outputs: int, repeats: int, nearest: bool) -> Cubin:
    """For an SM such as 89. channels: C; outputs: N."""
    chosen = plan(capability, dtype, channels, outputs, repeats, nearest)
    constants = _constants(chosen, channels, outputs, repeats, nearest)
    pointers = (*INPUTS, "y")
    return cubin.compile_cubin(
        kernel,
        capability,
        op=OP,
        signature=dict.fromkeys(pointers, f"*{dtype}")
        | dict.fromkeys(("height", "width"), "i32")
        | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def compile_cubins(
    targets: Iterable[str], dtype: str, channels: int, outputs: int, repeats: int, nearest: bool = False
) -> dict[str, str | bytes | int]:
    """Every attribute of a `sana::Conv3x3Upsample` node for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of all tensors; channels: C; outputs: N; repeats, which the function body reads; nearest: weights
    are zero but for a corner's four taps. Raises
    ValueError as `plan` does.
    """
    targets = list(targets)
    chosen = plan(
        min(cubin.CAPABILITIES), dtype, channels, outputs, repeats, nearest
    )  # of which only what all have in common is used
    batch, height, width = (["dim", 0, axis] for axis in range(3))
    found = cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, channels, outputs, repeats, nearest),
        inputs=[dtype] * len(INPUTS),
        outputs=[Output(type=dtype, shape=[batch, ["mul", height, 2], ["mul", width, 2], outputs])],
        grid=[chosen.programs(OP, ["mul", height, width], CORNERS * outputs), batch, 1],
        args=[*(["in", index] for index in range(len(INPUTS))), ["out", 0], ["i32", height], ["i32", width]],
    )
    return found | {"repeats": repeats, "nearest": int(nearest)}


def function_body(opset: int = 20) -> "onnx.FunctionProto":
    """The op in standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to x's type.

    Inputs as INPUTS, output out. Attribute repeats, 0 unless given; the plugin's are allowed and unused. opset: of the standard
    operators, 19 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def node(kind: str, inputs: str, output: str, **attributes: object) -> "onnx.NodeProto":
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    def constant(name: str, value: int | list[int]) -> "onnx.NodeProto":
        return node("Constant", "", name, **{"value_int" if isinstance(value, int) else "value_ints": value})

    repeats = helper.make_node("Constant", [], ["repeats"])
    repeats.attribute.append(AttributeProto(name="value_int", type=AttributeProto.INT, ref_attr_name="repeats"))
    # A function has no branch on an attribute: without a shortcut one is computed too, of channels that exist, and not added.
    nodes = [
        *(node("Cast", name, f"{name}_wide", to=TensorProto.FLOAT) for name in INPUTS),
        node("Transpose", "x_wide", "x_first", perm=[0, 3, 1, 2]),
        node("Transpose", "weight_wide", "weight_first", perm=[0, 3, 1, 2]),
        node("Conv", "x_first weight_first bias_wide", "conv", pads=[1, 1, 1, 1]),
        repeats,
        *(constant(name, value) for name, value in (("zero", 0), ("one", 1), ("last_axis", [-1]), ("by_corner", [-1, CORNERS]))),
        node("Greater", "repeats zero", "has_shortcut"),
        node("Max", "repeats one", "divisor"),
        node("Shape", "bias", "columns_vector"),
        node("Gather", "columns_vector zero", "columns"),
        node("Range", "zero columns one", "n_corner"),  # 4n + 2i + j
        node("Div", "n_corner divisor", "channel"),
        node("Shape", "x", "channels_vector", start=3),
        node("Sub", "channels_vector one", "last_channel"),
        node("Min", "channel last_channel", "channel_within"),
        node("Reshape", "channel_within by_corner", "channel_table"),
        node("Transpose", "channel_table", "corner_table", perm=[1, 0]),
        node("Reshape", "corner_table last_axis", "channel_of_column"),
        node("Gather", "x_first channel_of_column", "repeated", axis=1),
        node("CastLike", "zero repeated", "nothing"),
        node("Where", "has_shortcut repeated nothing", "shortcut"),
        node("Add", "conv shortcut", "columns_first"),
        node("DepthToSpace", "columns_first", "y_first", blocksize=2, mode="DCR"),
        node("Transpose", "y_first", "y", perm=[0, 2, 3, 1]),
        node("CastLike", "y x", "out"),
    ]
    defaults: dict[str, Any] = {
        "launch": "",
        "cubins": "",
        "plugin_version": "",
        "plugin_namespace": "",
        "repeats": 0,
        "nearest": 0,
    }
    return helper.make_function(
        DOMAIN,
        OP,
        list(INPUTS),
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attribute_protos=[helper.make_attribute(name, default) for name, default in defaults.items()],
    )
