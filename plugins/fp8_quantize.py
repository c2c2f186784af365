"""Rows to 8 bits a value, each with a scale of its own: the Triton kernel and its cubins.

What cuBLASLt multiplies in fp8 (plugins/cublas_lt.py) has one scale a row, chosen here from the row itself, without calibration:

    scale = max |row| / 448,  bits = e4m3(row / scale), rounded to nearest, ties to even

e4m3 has no infinity and 448 is its largest number, so the largest value of every row becomes ±448 and nothing is cut off. TensorRT
carries the bits as INT8, whose values mean nothing.

A scale is at least 2^-126, fp32's smallest normal number, so that its reciprocal is finite and none of its digits are lost: that is
the scale of rows below 448 times it, also of a row of zeros, whose bits are 0. A row with a NaN has NaN as its scale and in all its
bits; one with an infinity has an infinite scale and NaN in the infinity's place. A product with either is NaN, as it should be.

Only graphs for TensorRT have such nodes, which a build puts before products in fp8, so no function body is needed.

Dimensions: D channels of a row. x (…, D) fp16, bf16 or fp32 -> bits (…, D) int8, scale (…) fp32.
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
    import torch

__all__ = ["DOMAIN", "OP", "OUTPUTS", "check_target", "compile_cubin", "compile_cubins", "e4m3", "launch", "num_warps", "quantized"]

OP = "Fp8Quantize"
DOMAIN = "sana"
OUTPUTS = ("bits", "scale")
OLDEST = 89  # SM whose instructions convert to e4m3
RANKS = (2, 3, 4)  # of x
# Not measured: reasoned. As for the modulated norm, which reads and writes rows in the same way: 2 warps for 2240 channels.
CHANNELS, MAX_WARPS = 64, 16  # channels a thread
LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST = tl.constexpr(2.0**-126)  # of a scale: fp32's smallest normal number


@triton.jit
def e4m3(x):
    """The bits, int8, of x in fp32. What is beyond ±448 becomes that, infinities too (PTX has the conversion only with .satfinite);
    NaN stays NaN."""
    return x.to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def quantized(row_D, live_D):
    """(bits (D,) int8, scale fp32) of the row's channels that are live; the bits of others are 0."""
    row_D = tl.where(live_D, row_D.to(tl.float32), 0.0)
    # As integers, magnitudes have the order that they have as numbers and NaN is above all; a maximum of numbers passes over NaN.
    largest = tl.max(row_D.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, LARGEST)
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)  # not tl.maximum, which would replace NaN
    # Times the reciprocal: one instruction where a division takes about ten, and other bits only within 2^-22 of a tie.
    return e4m3(row_D * tl.div_rn(1.0, scale)), scale


@triton.jit
def quantize_kernel(x, bits, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one row."""
    row = tl.program_id(0).to(tl.int64)  # int64: 64 images of 4096 px pass 2**31 elements
    d_D = tl.arange(0, BLOCK)
    live_D = d_D < D
    bits_D, row_scale = quantized(tl.load(x + row * D + d_D, mask=live_D, other=0.0), live_D)
    tl.store(bits + row * D + d_D, bits_D, mask=live_D)
    tl.store(scale + row, row_scale)


def num_warps(dim: int) -> int:
    return min(max(triton.next_power_of_2(dim) // (32 * CHANNELS), 1), MAX_WARPS)


def _constants(dim: int) -> dict[str, int]:
    if dim < 1:
        raise ValueError(f"{OP}: got rows of {dim} channels; expected at least 1")
    return {"D": dim, "BLOCK": triton.next_power_of_2(dim)}


def check_target(op: str, capability: int) -> None:
    """Raises ValueError for an SM, such as 89, that does not convert to e4m3."""
    if capability < OLDEST:
        raise ValueError(
            f"{op}: got target sm{capability}; expected sm{OLDEST} or newer, which have fp8. Build for this target without fp8"
        )


def launch(x: "torch.Tensor", bits: "torch.Tensor", scale: "torch.Tensor") -> None:
    """Write bits (…, D), int8, and scale (…), fp32, of x (…, D), fp16, bf16 or fp32. All contiguous, on the current GPU, else
    ValueError."""
    shapes = (x.shape, x.shape, x.shape[:-1])
    types = ("float16 bfloat16 float32", "int8", "float32")
    tensors = (x, bits, scale)
    fits = all(
        t.is_contiguous() and t.shape == shape and str(t.dtype).removeprefix("torch.") in kinds.split() and t.device == x.device
        for t, shape, kinds in zip(tensors, shapes, types, strict=True)
    )
    if not fits:
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(f"{OP}: got {seen}; expected x and bits (…, D), scale (…), int8 and fp32, on one device, all contiguous")
    if x.numel() == 0:
        return
    dim = x.shape[-1]
    quantize_kernel[(scale.numel(),)](x, bits, scale, **_constants(dim), num_warps=num_warps(dim))


@functools.cache
def compile_cubin(capability: int, dtype: str, dim: int) -> Cubin:
    """For an SM such as 89; ValueError for an older one."""
    check_target(OP, capability)
    constants = _constants(dim)
    pointers = {"x": f"*{dtype}", "bits": "*i8", "scale": "*fp32"}
    return cubin.compile_cubin(
        quantize_kernel,
        capability,
        op=OP,
        signature=pointers | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=num_warps(dim),
    )


def compile_cubins(targets: Iterable[str], dtype: str, dim: int, rank: int) -> dict[str, str | bytes]:
    """Every attribute of a `sana::Fp8Quantize` node for the GPU architectures `targets` ("sm89", "sm90", ...).

    x: (…, dim) of `rank` dimensions and of dtype "fp16", "bf16" or "fp32". Raises ValueError for another dtype, a rank that is not
    in RANKS, and a target before sm89.
    """
    cubin.check_type(OP, dtype)
    if rank not in RANKS:
        raise ValueError(f"{OP}: got x of {rank} dimensions; expected one of {', '.join(map(str, RANKS))}")
    leading = [["dim", 0, axis] for axis in range(rank - 1)]
    return cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, dim),
        inputs=[dtype],
        outputs=[Output(type="int8", shape=[*leading, dim]), Output(type="fp32", shape=leading)],
        grid=[functools.reduce(lambda rows, size: ["mul", rows, size], leading), 1, 1],
        args=[["in", 0], ["out", 0], ["out", 1]],
    )
