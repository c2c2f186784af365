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
from plugins.rows import head_and_tail, num_warps, row_part

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHANNELS", "DOMAIN", "OP", "OUTPUTS", "check_target", "compile_cubin", "compile_cubins", "e4m3", "launch", "magnitude",
    "row_scale", "write_bits",
]  # fmt: skip

OP = "Fp8Quantize"
DOMAIN = "sana"
OUTPUTS = ("bits", "scale")
OLDEST = 89  # SM whose instructions convert to e4m3
RANKS = (2, 3, 4)  # of x
# A thread, at most: one warp for a row of 5600, 6.5 us for 2048 of them on an H200 where eight take 7.7.
CHANNELS = 176
LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST = tl.constexpr(2.0**-126)  # of a scale: fp32's smallest normal number


@triton.jit
def e4m3(x):
    """The bits, int8, of x in fp32. What is beyond ±448 becomes that, infinities too (PTX has the conversion only with .satfinite);
    NaN stays NaN."""
    return x.to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def magnitude(row, live):
    """The largest of some channels, as an integer. As integers, magnitudes have the order that they have as numbers and NaN is
    above all; a maximum of numbers passes over NaN."""
    return tl.max(tl.where(live, row, 0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def row_scale(largest):
    """The scale of a row whose magnitude that is, and its reciprocal: to multiply by that is one instruction where a division takes
    about ten, and gives other bits only within 2^-22 of a tie."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)  # not tl.maximum, which would replace NaN
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _loaded(x, row, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    d, live = row_part(START, SIZE, D)
    part = tl.load(x + row * D + d, mask=live, other=0.0)
    return part, magnitude(part, live)


@triton.jit
def write_bits(bits, row, part, inverse, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    d, live = row_part(START, SIZE, D)
    tl.store(bits + row * D + d, e4m3(part.to(tl.float32) * inverse), mask=live)


@triton.jit
def quantize_kernel(x, bits, scale, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """A program: one row."""
    row = tl.program_id(0).to(tl.int64)  # int64: 64 images of 4096 px pass 2**31 elements
    head, largest = _loaded(x, row, 0, HEAD, D)
    if TAIL > 0:
        tail, other = _loaded(x, row, HEAD, TAIL, D)
        largest = tl.maximum(largest, other)
    own_scale, inverse = row_scale(largest)
    tl.store(scale + row, own_scale)
    write_bits(bits, row, head, inverse, 0, HEAD, D)
    if TAIL > 0:
        write_bits(bits, row, tail, inverse, HEAD, TAIL, D)


def _constants(dim: int) -> dict[str, int]:
    return {"D": dim, **head_and_tail(dim)}


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
    quantize_kernel[(scale.numel(),)](x, bits, scale, **_constants(dim), num_warps=num_warps(dim, CHANNELS))


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
        num_warps=num_warps(dim, CHANNELS),
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
