"""SiLU for Triton kernels, by as few instructions as its precision allows."""

import math
import os

import triton
import triton.language as tl

__all__ = ["ASSEMBLY", "silu", "silu_of_twice", "silu_slope", "sixteenth_of_silu"]

LOG2E = tl.constexpr(math.log2(math.e))
# Exponential and reciprocal as the hardware's one instruction each, without the handling of subnormal numbers around it: a tenth of
# the kernel's time. Triton's interpreter knows no assembly.
ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def silu(x, COARSE: tl.constexpr = False):
    """COARSE: as `silu_of_twice`."""
    if COARSE:
        return silu_of_twice(0.5 * x)
    elif ASSEMBLY:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2E], tl.float32, True, 1)
        return x * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_of_twice(half):
    """SiLU of twice `half`, within 2**-11 |half|, by one instruction, not two, of the unit for such functions, for which the kernel
    waits. fp16 is computed two at a time, and rounded to that."""
    if half.dtype == tl.float16:
        if ASSEMBLY:
            asm: tl.constexpr = "{ .reg .b32 t; tanh.approx.f16x2 t, $1; fma.rn.f16x2 $0, $1, t, $1; }"
            return tl.inline_asm_elementwise(asm, "=r,r", [half], tl.float16, True, 2)
        else:
            return silu_of_twice(half.to(tl.float32)).to(tl.float16)
    elif ASSEMBLY:
        return half + half * tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, True, 1)
    else:
        return 2.0 * half / (1.0 + tl.exp(-2.0 * half))


@triton.jit
def sixteenth_of_silu(part):
    """A sixteenth of the SiLU of 32 times `part`, in fp16, which would not hold either at its own size. Computed as by
    silu_of_twice: where 16 part is infinite, its tanh is 1 or -1 all the same."""
    if ASSEMBLY:
        asm: tl.constexpr = (
            "{ .reg .b32 t, u; mov.b32 u, 0x4C004C00; mul.rn.f16x2 t, $1, u; tanh.approx.f16x2 t, t; fma.rn.f16x2 $0, $1, t, $1; }"
        )
        return tl.inline_asm_elementwise(asm, "=r,r", [part], tl.float16, True, 2)
    else:
        return (silu_of_twice(16.0 * part.to(tl.float32)) / 16.0).to(tl.float16)


@triton.jit
def silu_slope(x):
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))
