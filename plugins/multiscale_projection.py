"""q, k and v of DC-AE's multi-scale attention beside themselves as their neighbours see them: Triton kernel, ONNX body, cubins.

Its meaning is `multiscale_projection_truth` in sana_ref/conv_ops.py:

    out = [x, mix(near(x))], near: a depth-wise 5 x 5 convolution, mix: a product of each head's D channels with a matrix of its own

cuDNN's depth-wise convolution of half precision does not keep up with memory, and product, transpositions and concatenation around
it are passes over the widest tensor of a block. Here a program walks down a strip of four columns, four rows at a time; a thread
has two channels of all sixteen pixels, so that each of the 64 pixels around them is loaded and made fp32 once for up to 16 taps.
The sixteen are then a product's columns, on tensor cores.

Precision: sums in fp32; what goes into the product is rounded to x's type, as it is between two layers.

Dimensions: B pictures, h x w pixels, C channels, D of a head. x (B, h, w, C), near (25, C), mix (C, D): for each channel out the
weights of its head's channels in; out (B, h, w, 2C). In a program E channels of G heads, P pixels.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.launch import Output

if TYPE_CHECKING:
    import onnx
    import torch

OP = "MultiscaleProjection"
DOMAIN = "sana"
INPUTS = ("x", "near", "mix")
TYPES = ("fp16", "bf16")  # of an engine: in fp32 the decoder is not fused (export/components.py)
HEAD_DIMS = (16, 32, 64)  # 16: the least that a tensor core takes
KERNEL_SIZE = 5  # of near: written out below, as are the next two
COLUMNS, ROWS = 4, 4  # of the pixels under way
# Rows that a program walks down, a quarter of the picture's within these limits; E; warps: two channels a thread. Measured on an
# H200 (benchmarks/results/kernel_plans_h200.json): 128 x 128 pixels take 124 us with 32 rows, not 138.
LEAST_STRIP, STRIP, BLOCK_C, NUM_WARPS = 16, 32, 128, 2


@triton.jit
def _pixel(x, row, column, height, width, channels, c_E, live_E):
    """(E,) fp32, zero outside the picture."""
    column_E = tl.zeros_like(c_E) + tl.where((row >= 0) & (row < height), column, -1)
    live_E = live_E & (column_E >= 0) & (column_E < width)
    return tl.load(x + (row * width + column) * channels + c_E, mask=live_E, other=0.0).to(tl.float32)


@triton.jit
def _eight(x, row, column, height, width, channels, c_E, live_E):
    """A row's four pixels from `column` on, with the two on either side."""
    p0 = _pixel(x, row, column - 2, height, width, channels, c_E, live_E)
    p1 = _pixel(x, row, column - 1, height, width, channels, c_E, live_E)
    p2 = _pixel(x, row, column, height, width, channels, c_E, live_E)
    p3 = _pixel(x, row, column + 1, height, width, channels, c_E, live_E)
    p4 = _pixel(x, row, column + 2, height, width, channels, c_E, live_E)
    p5 = _pixel(x, row, column + 3, height, width, channels, c_E, live_E)
    p6 = _pixel(x, row, column + 4, height, width, channels, c_E, live_E)
    p7 = _pixel(x, row, column + 5, height, width, channels, c_E, live_E)
    return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def _taps(near, row: tl.constexpr, channels, c_E, live_E):
    at = near + row * 5 * channels + c_E
    t0 = tl.load(at, mask=live_E, other=0.0).to(tl.float32)
    t1 = tl.load(at + channels, mask=live_E, other=0.0).to(tl.float32)
    t2 = tl.load(at + 2 * channels, mask=live_E, other=0.0).to(tl.float32)
    t3 = tl.load(at + 3 * channels, mask=live_E, other=0.0).to(tl.float32)
    t4 = tl.load(at + 4 * channels, mask=live_E, other=0.0).to(tl.float32)
    return t0, t1, t2, t3, t4


@triton.jit
def _dot(sum_E, t, a, b, c, d, e):
    return sum_E + t[0] * a + t[1] * b + t[2] * c + t[3] * d + t[4] * e


@triton.jit
def _add(sums, t, row):
    """Sums of four columns + a row of taps on a row of eight."""
    s0 = _dot(sums[0], t, row[0], row[1], row[2], row[3], row[4])
    s1 = _dot(sums[1], t, row[1], row[2], row[3], row[4], row[5])
    s2 = _dot(sums[2], t, row[2], row[3], row[4], row[5], row[6])
    s3 = _dot(sums[3], t, row[3], row[4], row[5], row[6], row[7])
    return s0, s1, s2, s3


@triton.jit
def _store(out, row, column, height, width, channels, c_E, live_E, eight):
    """A row's four pixels as they are."""
    end = tl.where(row < height, width, 0)
    at = out + (row * width + column) * 2 * channels + c_E
    column_E = tl.zeros_like(c_E) + column
    tl.store(at, eight[2].to(out.dtype.element_ty), mask=live_E & (column_E < end))
    tl.store(at + 2 * channels, eight[3].to(out.dtype.element_ty), mask=live_E & (column_E + 1 < end))
    tl.store(at + 4 * channels, eight[4].to(out.dtype.element_ty), mask=live_E & (column_E + 2 < end))
    tl.store(at + 6 * channels, eight[5].to(out.dtype.element_ty), mask=live_E & (column_E + 3 < end))


@triton.jit
def _stacked(four, size: tl.constexpr):
    """Tensors 0 to 3 -> (E, size): a last axis, in which they lie as 0, 2, 1, 3, is the fastest."""
    joined = tl.join(tl.join(four[0], four[1]), tl.join(four[2], four[3]))
    return tl.reshape(joined, (joined.shape[0], size))


@triton.jit
def kernel(x, near, mix, out, height, width, channels, rows, D: tl.constexpr, E: tl.constexpr):
    """A program: E channels, four columns, `rows` rows of a picture."""
    G: tl.constexpr = E // D
    c_E = tl.program_id(0) * E + tl.arange(0, E)
    live_E = c_E < channels
    across = tl.cdiv(width, 4)
    column, first = tl.program_id(1) % across * 4, tl.program_id(1) // across * rows
    picture = tl.program_id(2).to(tl.int64)  # 32 pictures of 4096 px pass 2**31 elements; one has 2**30 at most
    x += picture * height * width * channels
    out += picture * height * width * 2 * channels
    t0, t1, t2 = _taps(near, 0, channels, c_E, live_E), _taps(near, 1, channels, c_E, live_E), _taps(near, 2, channels, c_E, live_E)
    t3, t4 = _taps(near, 3, channels, c_E, live_E), _taps(near, 4, channels, c_E, live_E)
    mix_ED = tl.load(mix + c_E[:, None] * D + tl.arange(0, D)[None, :], mask=live_E[:, None], other=0.0)
    p = tl.arange(0, 16)
    row_P, column_P = p // 2 % 2 + p % 2 * 2, column + p // 8 + p // 4 % 2 * 2  # in the order of _stacked

    for top in range(first, min(first + rows, height), 4):
        zero = tl.zeros((E,), tl.float32)
        nothing = zero, zero, zero, zero
        row = _eight(x, top - 2, column, height, width, channels, c_E, live_E)
        s0 = _add(nothing, t0, row)
        row = _eight(x, top - 1, column, height, width, channels, c_E, live_E)
        s0, s1 = _add(s0, t1, row), _add(nothing, t0, row)
        row = _eight(x, top, column, height, width, channels, c_E, live_E)
        _store(out, top, column, height, width, channels, c_E, live_E, row)
        s0, s1, s2 = _add(s0, t2, row), _add(s1, t1, row), _add(nothing, t0, row)
        row = _eight(x, top + 1, column, height, width, channels, c_E, live_E)
        _store(out, top + 1, column, height, width, channels, c_E, live_E, row)
        s0, s1, s2, s3 = _add(s0, t3, row), _add(s1, t2, row), _add(s2, t1, row), _add(nothing, t0, row)
        row = _eight(x, top + 2, column, height, width, channels, c_E, live_E)
        _store(out, top + 2, column, height, width, channels, c_E, live_E, row)
        s0, s1, s2, s3 = _add(s0, t4, row), _add(s1, t3, row), _add(s2, t2, row), _add(s3, t1, row)
        row = _eight(x, top + 3, column, height, width, channels, c_E, live_E)
        _store(out, top + 3, column, height, width, channels, c_E, live_E, row)
        s1, s2, s3 = _add(s1, t4, row), _add(s2, t3, row), _add(s3, t2, row)
        row = _eight(x, top + 4, column, height, width, channels, c_E, live_E)
        s2, s3 = _add(s2, t4, row), _add(s3, t3, row)
        row = _eight(x, top + 5, column, height, width, channels, c_E, live_E)
        s3 = _add(s3, t4, row)

        near_EP = _stacked((_stacked(s0, 4), _stacked(s1, 4), _stacked(s2, 4), _stacked(s3, 4)), 16)
        near_GDP, mix_GDD = tl.reshape(near_EP.to(mix_ED.dtype), (G, D, 16)), tl.reshape(mix_ED, (G, D, D))
        # ieee: for fp32 inputs; the default, TF32, has 10 bits of mantissa.
        mixed_EP = tl.reshape(tl.dot(mix_GDD, near_GDP, input_precision="ieee"), (E, 16))
        live_EP = live_E[:, None] & ((top + row_P < height) & (column_P < width))[None, :]
        at_EP = (((top + row_P) * width + column_P) * 2 * channels + channels)[None, :] + c_E[:, None]
        tl.store(out + at_EP, mixed_EP.to(out.dtype.element_ty), mask=live_EP)


def plan(dtype: str, channels: int, head_dim: int) -> dict[str, int]:
    """The kernel's constants. Raises ValueError for what it has none for."""
    cubin.check_type(OP, dtype)
    if head_dim not in HEAD_DIMS or channels < 1 or channels % head_dim:
        raise ValueError(f"{OP}: got {channels} channels, {head_dim} a head; expected a head of {HEAD_DIMS}, and a multiple of it")
    return {"D": head_dim, "E": BLOCK_C}


def strip_rows(height: int) -> int:
    """Of a program."""
    return min(STRIP, max(LEAST_STRIP, height // (4 * ROWS) * ROWS))


def launch(x: "torch.Tensor", near: "torch.Tensor", mix: "torch.Tensor", out: "torch.Tensor") -> None:
    """Write the op's result into out (B, h, w, 2C). All contiguous, one dtype of fp16, bf16, fp32, on the current GPU.

    Raises ValueError unless that holds, the shapes fit, and `plan` has constants for them.
    """
    tensors = (x, near, mix, out)
    fits = x.ndim == 4 and out.shape == (*x.shape[:3], 2 * x.shape[3]) and near.shape == (KERNEL_SIZE**2, x.shape[3])
    fits = fits and mix.ndim == 2 and mix.shape[0] == x.shape[3]
    if not fits or not all(t.is_contiguous() and t.dtype == x.dtype and t.device == x.device for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            f"{OP}: got x, near, mix, out {seen}; expected x (B, h, w, C), near (25, C), mix (C, D), out (B, h, w, 2C), all "
            "contiguous, of one dtype and device"
        )
    batch, height, width, channels = x.shape
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(x.dtype), str(x.dtype))
    constants = plan(dtype, channels, mix.shape[1])
    if out.numel() == 0:
        return
    rows = strip_rows(height)
    programs = (-(-channels // BLOCK_C), -(-width // COLUMNS) * -(-height // rows), batch)
    kernel[programs](*tensors, height, width, channels, rows, **constants, num_warps=NUM_WARPS)


@functools.cache
def compile_cubin(capability: int, dtype: str, head_dim: int) -> Cubin:
    """For an SM such as 89. dtype: one of TYPES; head_dim: D."""
    constants = plan(dtype, head_dim, head_dim)
    pointers = (*INPUTS, "out")
    return cubin.compile_cubin(
        kernel,
        capability,
        op=OP,
        signature=dict.fromkeys(pointers, f"*{dtype}")
        | dict.fromkeys(("height", "width", "channels", "rows"), "i32")
        | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=(*pointers, "channels"),  # a multiple of D
        num_warps=NUM_WARPS,
    )


def compile_cubins(targets: Iterable[str], dtype: str, channels: int, head_dim: int) -> dict[str, str | bytes | int]:
    """Every attribute of a `sana::MultiscaleProjection` node for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16" or "bf16" of all tensors; channels: C; head_dim: D. Raises ValueError for others, and as `plan` does.
    """
    plan(dtype, channels, head_dim)
    if dtype not in TYPES:
        raise ValueError(f"{OP}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}: without tensor cores it would be slow")
    batch, height, width = (["dim", 0, axis] for axis in range(3))
    rows = ["min", STRIP, ["max", LEAST_STRIP, ["mul", ["floordiv", height, 4 * ROWS], ROWS]]]
    strips = ["mul", ["ceildiv", width, COLUMNS], ["ceildiv", height, rows]]
    found = cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, head_dim),
        inputs=[dtype] * len(INPUTS),
        outputs=[Output(type=dtype, shape=[batch, height, width, 2 * channels])],
        grid=[-(-channels // BLOCK_C), strips, batch],
        args=[
            *(["in", index] for index in range(len(INPUTS))),
            ["out", 0],
            *(["i32", number] for number in (height, width, channels, rows)),
        ],
    )
    return found | body_attributes(channels, head_dim)


def body_attributes(channels: int, head_dim: int) -> dict[str, int]:
    """Attributes of a node that its function body reads: the groups of its two convolutions."""
    return {"channels": channels, "heads": channels // head_dim}


def function_body(opset: int = 20) -> "onnx.FunctionProto":
    """The op in standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to x's type.

    Inputs as INPUTS, output out. Attributes as `body_attributes`, required; the plugin's are allowed and unused. opset: of the
    standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def node(kind: str, inputs: str, output: str, group: str = "", **attributes: object) -> "onnx.NodeProto":
        made = helper.make_node(kind, inputs.split(), [output], **attributes)
        if group:
            made.attribute.append(AttributeProto(name="group", type=AttributeProto.INT, ref_attr_name=group))
        return made

    nodes = [
        *(node("Cast", name, f"{name}_wide", to=TensorProto.FLOAT) for name in INPUTS),
        node("Transpose", "x_wide", "x_first", perm=[0, 3, 1, 2]),
        node("Transpose", "near_wide", "near_rows", perm=[1, 0]),
        node("Constant", "", "filter_shape", value_ints=[-1, 1, KERNEL_SIZE, KERNEL_SIZE]),
        node("Reshape", "near_rows filter_shape", "near_filter"),
        node("Conv", "x_first near_filter", "near_first", "channels", pads=[KERNEL_SIZE // 2] * 4),
        node("Constant", "", "pointwise", value_ints=[2, 3]),
        node("Unsqueeze", "mix_wide pointwise", "mix_filter"),
        node("Conv", "near_first mix_filter", "mixed", "heads"),
        node("Concat", "x_first mixed", "out_first", axis=1),
        node("Transpose", "out_first", "out_wide", perm=[0, 2, 3, 1]),
        node("CastLike", "out_wide x", "out"),
    ]
    return helper.make_function(
        DOMAIN,
        OP,
        list(INPUTS),
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["channels", "heads"],
        attribute_protos=[helper.make_attribute(name, "") for name in ("launch", "cubins", "plugin_version", "plugin_namespace")],
    )
