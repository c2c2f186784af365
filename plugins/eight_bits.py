"""Numbers of 8 bits that share one scale, which is known before: what kernels of FP8 and of INT8 convolutions have in common.

    fp8     bits = e4m3(x / scale), cut to ±448; NaN stays NaN
    int8    bits = x / scale as the nearest whole number, of two the even one, cut to ±127; NaN, which it has not, becomes -127

What linear layers read is cut to -128 instead of -127, as ONNX's QuantizeLinear cuts it (plugins/static_scale.py).

TensorRT carries both as INT8.
"""

from collections.abc import Mapping
from typing import Literal

import triton
import triton.language as tl

from plugins import fp8_quantize
from plugins.fp8_quantize import e4m3

__all__ = ["KINDS", "LARGEST", "POINTERS", "Kind", "bits_of", "check_target"]

Kind = Literal["fp8", "int8"]
KINDS: tuple[Kind, ...] = ("fp8", "int8")
LARGEST: Mapping[Kind, float] = {"fp8": 448.0, "int8": 127.0}
POINTERS: Mapping[Kind, str] = {"fp8": "*fp8e4nv", "int8": "*i8"}  # Triton's, of what a tensor core multiplies
# 1.5 * 2^23: fp32 has whole numbers alone there, so that adding it rounds, to nearest and ties to even, and the lowest byte of the
# sum is the number in two's complement. An addition, where a conversion has a quarter of the rate or less.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def bits_of(x, KIND: tl.constexpr, LEAST: tl.constexpr = -127.0):
    """The bits, int8, of x in fp32, which was divided by the scale. LEAST: of INT8, -127 or -128."""
    if KIND == "int8":
        x = tl.minimum(tl.maximum(x, LEAST), 127.0)
        return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return e4m3(x)


def check_target(kind: Kind, op: str, capability: int) -> None:
    """Raises ValueError for an SM, such as 89, that has no such numbers; all that are compiled for have int8."""
    if kind == "fp8":
        fp8_quantize.check_target(op, capability)
