"""3x3 convolutions of FP8 or INT8 pictures with the channels last: Triton kernels and cubins.

    Fp8Conv3x3, Int8Conv3x3            y = activation(s conv(x) + bias)
    Fp8Conv3x3Norm, Int8Conv3x3Norm    y = residual + RMSNorm(s conv(x)), the norm over all channels of a pixel

As plugins/conv3x3.py, whose sum it is, with bits (plugins/eight_bits.py) for x and weight, so that a tensor core does twice the
work in the same time. s (N,) is the scale of x, one for all pixels, times that of a channel's weights. All pixels share one,
because a sum mixes nine of them; so x's is known before (calibrated), and a kernel that makes x quantises it on the way. Here that
is `out_scale`: without norm bits are written in place of y; with norm, whose y is also the next block's residual, besides, of the
y that was not rounded. They are of x's kind.

Precision: products are exact. FP8: on SM 90 a tensor core adds them with about 13 bits of mantissa. INT8: sums are exact, in 32
bits, which those of MAX_CHANNELS never pass. Scales, activation and norm in fp32; SiLU is within 2**-12 |x|. Around the picture
x is 0, which both kinds have.

Only graphs for TensorRT have such nodes, so no function body is needed. TensorRT carries bits as INT8.

Dimensions: B pictures, h x w pixels, C channels in, N out. x (B, h, w, C) and weight (N, 3, 3, C) bits, y and residual
(B, h, w, N) fp16 or bf16, norm_weight, norm_bias and bias (N,) as y, s (N,) fp32. In a program M pixels, N channels out, K channels
in at a time.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins import conv3x3, cubin
from plugins.conv3x3 import ACTIVATIONS, EPS, Plan
from plugins.conv3x3_kernels import activated, block_of, convolved, outputs_at, row_of
from plugins.cubin import Cubin
from plugins.eight_bits import LARGEST, POINTERS, Kind, bits_of, check_target
from plugins.launch import Output

if TYPE_CHECKING:
    import torch

__all__ = ["DOMAIN", "INPUTS", "MAX_CHANNELS", "OPS", "TYPES", "compile_cubin", "compile_cubins", "launch", "launch_norm", "plan"]

OPS: Mapping[str, tuple[Kind, str]] = {  # their numbers, and the op of plugins/conv3x3.py that they are
    "Fp8Conv3x3": ("fp8", conv3x3.OP),
    "Fp8Conv3x3Norm": ("fp8", conv3x3.NORM),
    "Int8Conv3x3": ("int8", conv3x3.OP),
    "Int8Conv3x3Norm": ("int8", conv3x3.NORM),
}
DOMAIN = "sana"
INPUTS = {
    conv3x3.OP: ("x", "weight", "scales", "bias"),
    conv3x3.NORM: ("x", "weight", "scales", "residual", "norm_weight", "norm_bias"),
}
TYPES = ("fp16", "bf16")  # of y

# Bytes as in conv3x3.BLOCK_K, and so twice its channels.
BLOCK_K, SMALL_BLOCK_K, LEAST_K = 128, 64, 32  # LEAST_K: what a tensor core takes of 8 bits
INT8_BLOCK_N = 128
MAX_CHANNELS = (2**31 - 1) // (9 * int(LARGEST["int8"]) ** 2)  # of INT8: 14793


@triton.jit
def conv_kernel(
    x,
    weight,
    scales,
    bias,
    y,
    height,
    width,
    out_scale,
    KIND: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program: M pixels of a picture, N channels. out_scale: None, or y is of bits."""
    picture = tl.program_id(1)
    start, first_channel = block_of(height * width, N, BLOCK_M, BLOCK_N, GROUP_M)
    n_N = first_channel + tl.arange(0, BLOCK_N)
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if KIND == "int8" else tl.float32)
    sums_MN = convolved(sums_MN, x, weight, picture, start, n_N, height, width, C, N, BLOCK_M, BLOCK_N, BLOCK_K)
    y_MN = activated(sums_MN.to(tl.float32) * row_of(scales, n_N, N) + row_of(bias, n_N, N), ACTIVATION, True)
    first, at_MN, live_MN = outputs_at(picture, start, n_N, height, width, N, BLOCK_M)
    out_MN = bits_of(y_MN * tl.div_rn(1.0, out_scale), KIND) if out_scale is not None else y_MN.to(y.dtype.element_ty)
    tl.store(y + first + at_MN, out_MN, mask=live_MN)


@triton.jit
def norm_kernel(
    x,
    weight,
    scales,
    residual,
    norm_weight,
    norm_bias,
    y,
    bits,
    height,
    width,
    eps,
    out_scale,
    KIND: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: M pixels of a picture, all channels. bits and out_scale: both None, or bits are written too."""
    picture = tl.program_id(1)
    start = tl.program_id(0) * BLOCK_M
    n_N = tl.arange(0, BLOCK_N)
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if KIND == "int8" else tl.float32)
    sums_MN = convolved(sums_MN, x, weight, picture, start, n_N, height, width, C, N, BLOCK_M, BLOCK_N, BLOCK_K)
    conv_MN = sums_MN.to(tl.float32) * row_of(scales, n_N, N)
    scale_M = tl.rsqrt(tl.sum(conv_MN * conv_MN, axis=1) / N + eps)  # past the end of the channels the sums are zero
    normed_MN = conv_MN * scale_M[:, None] * row_of(norm_weight, n_N, N) + row_of(norm_bias, n_N, N)
    first, at_MN, live_MN = outputs_at(picture, start, n_N, height, width, N, BLOCK_M)
    y_MN = tl.load(residual + first + at_MN, mask=live_MN, other=0.0).to(tl.float32) + normed_MN
    tl.store(y + first + at_MN, y_MN.to(y.dtype.element_ty), mask=live_MN)
    if bits is not None:
        tl.store(bits + first + at_MN, bits_of(y_MN * tl.div_rn(1.0, out_scale), KIND), mask=live_MN)


def plan(op: str, capability: int, channels: int, outputs: int) -> Plan:
    """For one of OPS, an SM such as 89, C and N: conv3x3's in half precision, but for K and, of INT8, the sums of a thread: half as
    many, where one of 512 channels takes 260 us, not 306 (H200; benchmarks/results/kernel_plans_h200.json). With a norm of 128
    channels half of K is 3 and 6 % faster there, but spills registers where Triton 3.9 compiles it.

    Raises ValueError as that does, and for more channels in than MAX_CHANNELS of INT8.
    """
    kind, form = OPS[op]
    half = conv3x3.plan(form, capability, "fp16", channels, outputs)
    if kind == "int8" and channels > MAX_CHANNELS:
        raise ValueError(
            f"{op}: got {channels} channels in; expected at most {MAX_CHANNELS}, whose sums fit into 32 bits. Use bf16"
        )
    largest = BLOCK_K if cubin.max_shared(capability) > cubin.MAX_SHARED else SMALL_BLOCK_K
    narrow = kind == "int8" and form == conv3x3.OP
    return Plan(
        block_m=half.block_m,
        block_n=min(half.block_n, INT8_BLOCK_N) if narrow else half.block_n,
        block_k=min(largest, max(triton.next_power_of_2(channels), LEAST_K)),
        num_warps=8 if narrow and half.block_n >= INT8_BLOCK_N else half.num_warps,
    )


def _constants(op: str, chosen: Plan, channels: int, outputs: int, activation: str) -> dict[str, Any]:
    kind, form = OPS[op]
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    sizes = {"KIND": kind, "C": channels, "N": outputs}
    blocks = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
    return sizes | blocks | ({"ACTIVATION": activation, "GROUP_M": conv3x3.GROUP_M} if form == conv3x3.OP else {})


def launch(
    op: str,
    x: "torch.Tensor",
    weight: "torch.Tensor",
    scales: "torch.Tensor",
    bias: "torch.Tensor",
    y: "torch.Tensor",
    activation: str = "none",
    out_scale: float | None = None,
) -> None:
    """Write the result of Fp8Conv3x3 or Int8Conv3x3 into y, bits where there is an out_scale. Shapes and types as in the module's
    docstring, all contiguous, on the current GPU, else ValueError."""
    _check(op, (x, weight, scales, bias), y, None if out_scale is None else y)
    batch, height, width, outputs = y.shape
    chosen = plan(op, _capability(y), x.shape[-1], outputs)
    constants = _constants(op, chosen, x.shape[-1], outputs, activation)
    if y.numel():
        options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        given = (_numbers(op, x), _numbers(op, weight), scales, bias, y, height, width, out_scale)
        conv_kernel[chosen.programs(OPS[op][1], height * width, outputs), batch](*given, **constants, **options)


def launch_norm(
    op: str,
    x: "torch.Tensor",
    weight: "torch.Tensor",
    scales: "torch.Tensor",
    residual: "torch.Tensor",
    norm_weight: "torch.Tensor",
    norm_bias: "torch.Tensor",
    y: "torch.Tensor",
    bits: "torch.Tensor | None" = None,
    out_scale: float | None = None,
    eps: float = EPS,
) -> None:
    """Write y of Fp8Conv3x3Norm or Int8Conv3x3Norm and, where there is an out_scale, bits. As `launch`;
    also raises ValueError for N above conv3x3.MAX_NORM."""
    if (bits is None) != (out_scale is None):
        raise ValueError(f"{op}: got {'bits' if out_scale is None else 'out_scale'} alone; expected both or neither")
    _check(op, (x, weight, scales, residual, norm_weight, norm_bias), y, bits)
    batch, height, width, outputs = y.shape
    chosen = plan(op, _capability(y), x.shape[-1], outputs)
    constants = _constants(op, chosen, x.shape[-1], outputs, "none")
    if y.numel():
        options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        given = (_numbers(op, x), _numbers(op, weight), scales, residual, norm_weight, norm_bias, y, bits)
        given = (*given, height, width, eps, out_scale)
        norm_kernel[chosen.programs(OPS[op][1], height * width, outputs), batch](*given, **constants, **options)


def _check(op: str, inputs: "tuple[torch.Tensor, ...]", y: "torch.Tensor", bits: "torch.Tensor | None") -> None:
    x, weight, scales, *others = inputs
    half = others[-1].dtype
    shape = (*x.shape[:3], weight.shape[0])
    wanted = [(x, x.shape[:3] + weight.shape[-1:], "int8"), (weight, (shape[-1], 3, 3, x.shape[-1]), "int8")]
    wanted += [(scales, shape[-1:], "float32"), *((t, shape if t.ndim == 4 else shape[-1:], str(half)) for t in others)]
    wanted += [] if y is bits else [(y, shape, str(half))]
    wanted += [] if bits is None else [(bits, shape, "int8")]
    fits = x.ndim == 4 and str(half).removeprefix("torch.") in ("float16", "bfloat16")
    for t, size, kind in wanted:
        same = t.shape == size and str(t.dtype).removeprefix("torch.") == kind.removeprefix("torch.")
        fits = fits and same and t.is_contiguous() and t.device == x.device
    if not fits:
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t, _, _ in wanted)
        raise ValueError(
            f"{op}: got {', '.join(INPUTS[OPS[op][1]])}, y and bits {seen}; expected x (B, h, w, C) and weight (N, 3, 3, C) int8, "
            "scales (N,) fp32, bits (B, h, w, N) int8, y, residual (B, h, w, N), vectors (N,) fp16 or bf16, contiguous"
        )


def _numbers(op: str, bits: "torch.Tensor") -> "torch.Tensor":
    import torch

    return bits.view(torch.float8_e4m3fn) if OPS[op][0] == "fp8" else bits


def _capability(y: "torch.Tensor") -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(y.device) if y.is_cuda else (8, 9)  # a CPU: Triton's interpreter
    return 10 * major + minor


def _outputs(op: str, dtype: str, quantized: bool) -> dict[str, str]:
    """By name: Triton's type of a pointer, or constexpr for one that is None."""
    if OPS[op][1] == conv3x3.OP:
        return {"y": "*i8" if quantized else f"*{dtype}"}
    return {"y": f"*{dtype}", "bits": "*i8" if quantized else "constexpr"}


@functools.cache
def compile_cubin(
    op: str, capability: int, dtype: str, channels: int, outputs: int, activation: str = "none", quantized: bool = False
) -> Cubin:
    """For one of OPS and an SM such as 89; ValueError for one without such numbers. dtype: of y; channels: C; outputs: N;
    quantized: bits."""
    kind, form = OPS[op]
    check_target(kind, op, capability)
    if dtype not in TYPES:
        raise ValueError(f"{op}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}")
    chosen = plan(op, capability, channels, outputs)
    constants = _constants(op, chosen, channels, outputs, activation)
    types = {"x": POINTERS[kind], "weight": POINTERS[kind], "scales": "*fp32"}
    pointers = {name: types.get(name, f"*{dtype}") for name in INPUTS[form]} | _outputs(op, dtype, quantized)
    numbers = dict.fromkeys(("height", "width"), "i32") | ({"eps": "fp32"} if form == conv3x3.NORM else {})
    numbers |= {"out_scale": "fp32" if quantized else "constexpr"}
    absent = [name for name, each in (pointers | numbers).items() if each == "constexpr"]
    return cubin.compile_cubin(
        conv_kernel if form == conv3x3.OP else norm_kernel,
        capability,
        op=op,
        signature=pointers | numbers | dict.fromkeys(constants, "constexpr"),
        constants=constants | dict.fromkeys(absent),
        aligned=[name for name in pointers if name not in absent],
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def compile_cubins(
    op: str,
    targets: Iterable[str],
    dtype: str,
    channels: int,
    outputs: int,
    *,
    activation: str = "none",
    eps: float = EPS,
    out_scale: float | None = None,
) -> dict[str, str | bytes | float]:
    """Every attribute of a node of one of OPS for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16" or "bf16" of y; channels: C; outputs: N; activation: without norm; eps: with norm; out_scale: of bits, without norm
    in place of y, with norm a second output. Raises ValueError for what `plan` and `_constants` refuse, another dtype, and a target
    that has no such numbers.
    """
    targets, norm = list(targets), OPS[op][1] == conv3x3.NORM
    chosen = plan(op, min(int(target.removeprefix("sm")) for target in targets), channels, outputs)
    shape = [*(["dim", 0, axis] for axis in range(3)), outputs]
    batch, height, width, _ = shape
    bits = [] if out_scale is None else [Output(type="int8", shape=shape)]
    made = bits or [Output(type=dtype, shape=shape)]
    if norm:
        made = [Output(type=dtype, shape=shape), *bits]
    types = {"x": "int8", "weight": "int8", "scales": "fp32"}
    return cubin.attributes(
        op,
        targets,
        lambda capability: compile_cubin(op, capability, dtype, channels, outputs, activation, out_scale is not None),
        inputs=[types.get(name, dtype) for name in INPUTS[OPS[op][1]]],
        outputs=made,
        grid=[chosen.programs(OPS[op][1], ["mul", height, width], outputs), batch, 1],
        args=[
            *(["in", index] for index in range(len(INPUTS[OPS[op][1]]))),
            *(["out", index] for index in range(len(made))),
            ["i32", height],
            ["i32", width],
            *([["f32", eps]] if norm else []),
            *([] if out_scale is None else [["f32", out_scale]]),
        ],
    )
