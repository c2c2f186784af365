"""The end of DC-AE's decoder, a norm, ReLU and a 3x3 convolution to a picture's few channels: Triton kernels, ONNX bodies, cubins.

Their meaning is in sana_ref/tap_ops.py:

    NormedTaps   taps = relu(RMSNorm(x)) weight: of each pixel what it gives to each of the nine pixels around, a plane each
    TapSum       y = the sum of what nine pixels give to one, + bias

The widest tensor of a decode, of 128 channels at full resolution, is read here once. A convolution reads it nine times, if mostly
from a cache, after a norm has read it and written it anew; and of the 16 columns that a tensor core multiplies at least it needs 3.
Here the columns are 27. Between the kernels lie 27 fp32 numbers a pixel, in planes, so that neighbours are read side by side.

Precision: norm and sums in fp32; what goes into the product is rounded to x's type, as it is between two layers.

Dimensions: B pictures, h x w pixels, C channels in, N out. x (B, h, w, C), norm_weight and norm_bias (C,), weight (C, 9 N), whose
columns are ordered (n, tap), the taps row by row; taps (B, 9 N, h, w) fp32; bias (N,), y (B, h, w, N). In a program M pixels.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins import cubin
from plugins.conv3x3 import EPS, norm_nodes
from plugins.cubin import Cubin
from plugins.launch import Output

if TYPE_CHECKING:
    import onnx
    import torch

OP, SUM = "NormedTaps", "TapSum"
DOMAIN = "sana"
INPUTS = {OP: ("x", "norm_weight", "norm_bias", "weight"), SUM: ("taps", "bias")}
TYPES = ("fp16", "bf16")  # of an engine: in fp32 the decoder is not fused (export/components.py)
MAX_CHANNELS, MAX_OUTPUTS = 256, 3  # C, all of which a program has; N, whose 9 N columns fit into 32
LEAST = 16  # the shortest side of a block that a tensor core takes
# By measurement on an H200 (benchmarks/results/kernel_plans_end_h200.json), for other GPUs reasoned. At 1024 px of 128 channels 64
# pixels and four warps take 130 us; with 32 pixels, 128, or eight warps it is 154 to 177. Sums take 32 to 34 us by any plan.
# Reckoned from registers, five programs share a multiprocessor then; of 256 channels, which were not measured, two.
BLOCK_M, NUM_WARPS = 64, 4
SUM_BLOCK, SUM_WARPS = 256, 8


@triton.jit
def taps_kernel(
    x,
    norm_weight,
    norm_bias,
    weight,
    taps,
    pixels,
    eps,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A program: M pixels of a picture."""
    start, picture = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    x += (picture * pixels + start) * C  # int64: a picture of 4096 px has 2**31 elements at 128 channels
    taps += picture * pixels * COLUMNS
    m_M, c_C, n_N = tl.arange(0, BLOCK_M), tl.arange(0, PADDED), tl.arange(0, PADDED_COLUMNS)
    live_M, live_C, live_N = start + m_M < pixels, c_C < C, n_N < COLUMNS
    x_MC = tl.load(x + m_M[:, None] * C + c_C[None, :], mask=live_M[:, None] & live_C[None, :], other=0.0).to(tl.float32)
    scale_M = tl.rsqrt(tl.sum(x_MC * x_MC, axis=1) / C + eps)
    norm_weight_C = tl.load(norm_weight + c_C, mask=live_C, other=0.0).to(tl.float32)
    norm_bias_C = tl.load(norm_bias + c_C, mask=live_C, other=0.0).to(tl.float32)
    normed_MC = x_MC * scale_M[:, None] * norm_weight_C[None, :] + norm_bias_C[None, :]
    normed_MC = tl.where(normed_MC < 0, 0.0, normed_MC)  # NaN stays NaN, which a maximum would not leave
    weight_CN = tl.load(weight + c_C[:, None] * COLUMNS + n_N[None, :], mask=live_C[:, None] & live_N[None, :], other=0.0)
    taps_MN = tl.dot(normed_MC.to(weight_CN.dtype), weight_CN)
    plane_N = n_N.to(tl.int64) * pixels  # 27 planes of 9000 px are 2**31 elements
    tl.store(taps + plane_N[None, :] + (start + m_M)[:, None], taps_MN, mask=live_M[:, None] & live_N[None, :])


@triton.jit
def sum_kernel(taps, bias, y, height, width, N: tl.constexpr, BLOCK: tl.constexpr):
    """A program: as many pixels of a picture, counted along its rows."""
    picture, pixels = tl.program_id(1).to(tl.int64), height * width
    taps += picture * pixels * (9 * N)
    y += picture * pixels * N
    pixel_M = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_M, column_M, live_M = pixel_M // width, pixel_M % width, pixel_M < pixels
    for n in tl.static_range(N):
        sum_M = tl.zeros((BLOCK,), tl.float32) + tl.load(bias + n).to(tl.float32)
        for tap in tl.static_range(9):
            down, right = tap // 3 - 1, tap % 3 - 1
            there_M = (row_M + down >= 0) & (row_M + down < height) & (column_M + right >= 0) & (column_M + right < width)
            sum_M += tl.load(taps + (down * width + right) + pixel_M, mask=live_M & there_M, other=0.0)
            taps += pixels  # the next plane
        tl.store(y + pixel_M * N + n, sum_M.to(y.dtype.element_ty), mask=live_M)


def check_sizes(dtype: str, channels: int, outputs: int) -> None:
    """Raises ValueError for what there is no kernel for."""
    if dtype not in TYPES:
        raise ValueError(f"{OP}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}: without tensor cores it would be slow")
    if not 1 <= channels <= MAX_CHANNELS or not 1 <= outputs <= MAX_OUTPUTS:
        raise ValueError(
            f"{OP}: got {channels} channels in, {outputs} out; expected 1 to {MAX_CHANNELS}, which a program holds, and 1 to "
            f"{MAX_OUTPUTS}"
        )


def _constants(op: str, channels: int, outputs: int) -> tuple[dict[str, int], int]:
    """A kernel's constants, and its warps."""
    if op == SUM:
        return {"N": outputs, "BLOCK": SUM_BLOCK}, SUM_WARPS
    columns, sides = 9 * outputs, {"C": channels, "PADDED": max(LEAST, triton.next_power_of_2(channels))}
    return sides | {
        "COLUMNS": columns,
        "PADDED_COLUMNS": max(LEAST, triton.next_power_of_2(columns)),
        "BLOCK_M": BLOCK_M,
    }, NUM_WARPS


def launch(
    x: "torch.Tensor",
    norm_weight: "torch.Tensor",
    norm_bias: "torch.Tensor",
    weight: "torch.Tensor",
    taps: "torch.Tensor",
    eps: float = EPS,
) -> None:
    """Write relu(RMSNorm(x)) weight into taps (B, 9 N, h, w) fp32. Shapes as in the module's docstring; all contiguous and on the
    current GPU, the others of one dtype, fp16 or bf16. Raises ValueError unless that holds, and as check_sizes does.
    """
    import torch

    batch, height, width, channels = x.shape
    fits = taps.ndim == 4 and taps.shape == (batch, taps.shape[1], height, width) and weight.shape == (channels, taps.shape[1])
    fits = fits and norm_weight.shape == norm_bias.shape == (channels,) and taps.shape[1] % 9 == 0
    fits = fits and taps.dtype == torch.float32 and x.dtype == norm_weight.dtype == norm_bias.dtype == weight.dtype
    _check(OP, fits, (x, norm_weight, norm_bias, weight, taps), "(B, h, w, C), twice (C,), (C, 9 N), (B, 9 N, h, w) fp32")
    check_sizes(_name(x), channels, taps.shape[1] // 9)
    if taps.numel() == 0:
        return
    constants, warps = _constants(OP, channels, taps.shape[1] // 9)
    programs = (-(-height * width // BLOCK_M), batch)
    taps_kernel[programs](x, norm_weight, norm_bias, weight, taps, height * width, eps, **constants, num_warps=warps)


def launch_sum(taps: "torch.Tensor", bias: "torch.Tensor", y: "torch.Tensor") -> None:
    """Write the sums into y (B, h, w, N). As `launch`; bias and y of one dtype, fp16 or bf16."""
    import torch

    batch, height, width, outputs = y.shape
    fits = taps.shape == (batch, 9 * outputs, height, width) and bias.shape == (outputs,)
    fits = fits and taps.dtype == torch.float32 and bias.dtype == y.dtype
    _check(SUM, fits, (taps, bias, y), "(B, 9 N, h, w) fp32, (N,), (B, h, w, N)")
    check_sizes(_name(y), 1, outputs)
    if y.numel() == 0:
        return
    constants, warps = _constants(SUM, 1, outputs)
    sum_kernel[-(-height * width // SUM_BLOCK), batch](taps, bias, y, height, width, **constants, num_warps=warps)


def _name(tensor: "torch.Tensor") -> str:
    return {"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(str(tensor.dtype), str(tensor.dtype))


def _check(op: str, fits: bool, tensors: "tuple[torch.Tensor, ...]", wanted: str) -> None:
    if not fits or not all(t.is_contiguous() and t.device == tensors[0].device for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(f"{op}: got {seen}; expected {wanted}, all contiguous, on one device, the others of one dtype")


@functools.cache
def compile_cubin(op: str, capability: int, dtype: str, channels: int, outputs: int) -> Cubin:
    """For OP or SUM and an SM such as 89. channels: C, of OP; outputs: N."""
    constants, warps = _constants(op, channels, outputs)
    if op == OP:
        tensors = dict.fromkeys(INPUTS[op], f"*{dtype}") | {"taps": "*fp32"}
        numbers = {"pixels": "i32", "eps": "fp32"}
    else:
        tensors = {"taps": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}"}
        numbers = dict.fromkeys(("height", "width"), "i32")
    return cubin.compile_cubin(
        taps_kernel if op == OP else sum_kernel,
        capability,
        op=op,
        signature=tensors | numbers | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=tuple(tensors),
        num_warps=warps,
    )


def compile_cubins(
    op: str, targets: Iterable[str], dtype: str, channels: int, outputs: int, *, eps: float = EPS
) -> dict[str, str | bytes | float | int]:
    """Every attribute of a node of OP or SUM for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16" or "bf16" of all tensors but taps; channels: C, of OP, 1 of SUM; outputs: N. eps: of OP. The function bodies read
    eps and channels. Raises ValueError as check_sizes does.
    """
    check_sizes(dtype, channels, outputs)
    batch = ["dim", 0, 0]
    height, width = (["dim", 0, axis] for axis in ((1, 2) if op == OP else (2, 3)))
    pixels = ["mul", height, width]
    args: list[list[Any]] = [*(["in", number] for number in range(len(INPUTS[op]))), ["out", 0]]
    if op == OP:
        args += [["i32", pixels], ["f32", eps]]
        inputs, output, block = [dtype] * 4, Output(type="fp32", shape=[batch, 9 * outputs, height, width]), BLOCK_M
    else:
        args += [["i32", height], ["i32", width]]
        inputs, output, block = ["fp32", dtype], Output(type=dtype, shape=[batch, height, width, outputs]), SUM_BLOCK
    found = cubin.attributes(
        op,
        targets,
        lambda capability: compile_cubin(op, capability, dtype, channels, outputs),
        inputs=inputs,
        outputs=[output],
        grid=[["ceildiv", pixels, block], batch, 1],
        args=args,
    )
    return found | ({"eps": eps} if op == OP else {"channels": outputs})


def function_body(op: str, opset: int = 20) -> "onnx.FunctionProto":
    """OP or SUM in standard ONNX operators, for every reader that has no plugin: fp32 inside, y cast to the bias' type.

    Inputs as INPUTS, output out. Attributes eps of OP, and channels (N) of SUM, which is required; the plugin's are allowed and
    unused. opset: of the standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def node(kind: str, inputs: str, output: str, **attributes: object) -> "onnx.NodeProto":
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    defaults: dict[str, Any] = {"launch": "", "cubins": "", "plugin_version": "", "plugin_namespace": ""}
    if op == OP:
        defaults["eps"] = EPS
        nodes = [
            *(node("Cast", name, f"{name}_wide", to=TensorProto.FLOAT) for name in INPUTS[op]),
            *norm_nodes("x_wide"),
            node("Relu", "normed", "live"),
            node("MatMul", "live weight_wide", "products"),
            node("Transpose", "products", "out", perm=[0, 3, 1, 2]),
        ]
    else:  # a grouped convolution: of the planes of an n each has one tap that is 1, its own
        ones = [float(tap == place) for tap in range(9) for place in range(9)]
        identity = helper.make_tensor("identity", TensorProto.FLOAT, [1, 9, 3, 3], ones)
        sums = node("Conv", "taps own bias_wide", "sums", pads=[1, 1, 1, 1])
        sums.attribute.append(AttributeProto(name="group", type=AttributeProto.INT, ref_attr_name="channels"))
        nodes = [
            node("Cast", "bias", "bias_wide", to=TensorProto.FLOAT),
            helper.make_node("Constant", [], ["identity"], value=identity),
            node("Shape", "bias", "count"),
            helper.make_node("Constant", [], ["others"], value_ints=[1, 1, 1]),
            helper.make_node("Concat", ["count", "others"], ["repeats"], axis=0),
            node("Tile", "identity repeats", "own"),
            sums,
            node("Transpose", "sums", "last", perm=[0, 2, 3, 1]),
            node("CastLike", "last bias", "out"),
        ]
    return helper.make_function(
        DOMAIN,
        op,
        list(INPUTS[op]),
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=[] if op == OP else ["channels"],
        attribute_protos=[helper.make_attribute(name, default) for name, default in defaults.items()],
    )
