"""A tensor to bits of FP8 or INT8 with one scale that is known before: the Triton kernel and its cubins.

    Fp8StaticQuantize, Int8StaticQuantize    bits of x / scale, as plugins/eight_bits.py has them

For inputs of quantised convolutions (plugins/conv3x3_quantized.py) that no such convolution made. Only graphs for TensorRT have
such nodes, so no function body is needed.

x (…) fp16 or bf16 -> bits (…) int8.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.eight_bits import Kind, bits_of, check_target
from plugins.launch import Output

if TYPE_CHECKING:
    import torch

__all__ = ["DOMAIN", "OP", "compile_cubin", "compile_cubins", "launch"]

OP: Mapping[Kind, str] = {"fp8": "Fp8StaticQuantize", "int8": "Int8StaticQuantize"}
DOMAIN = "sana"
TYPES = ("fp16", "bf16")
# 16 numbers a thread: two loads of 16 bytes, one store. Of 12 plans the fastest, to 0.1 %, on an H200
# (benchmarks/results/kernel_plans_h200.json).
BLOCK, NUM_WARPS = 2048, 4


@triton.jit
def quantize_kernel(x, bits, rows, scale, KIND: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """A program: BLOCK numbers of rows of D."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64: a picture of 4096 px alone has 2**31 numbers at 128 channels
    left = rows.to(tl.int64) * D - start
    n_N = tl.arange(0, BLOCK)
    live_N = n_N < left
    x_N = tl.load(x + start + n_N, mask=live_N, other=0.0).to(tl.float32)
    tl.store(bits + start + n_N, bits_of(x_N * tl.div_rn(1.0, scale), KIND), mask=live_N)


def launch(kind: Kind, x: "torch.Tensor", bits: "torch.Tensor", scale: float) -> None:
    """Write bits, int8, of x (…, D), fp16 or bf16. Both contiguous, of one shape, on the current GPU, and scale above 0, else
    ValueError."""
    fits = bits.shape == x.shape and x.is_contiguous() and bits.is_contiguous() and x.device == bits.device and x.ndim > 0
    if not fits or str(bits.dtype) != "torch.int8" or str(x.dtype) not in ("torch.float16", "torch.bfloat16") or not scale > 0:
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in (x, bits))
        raise ValueError(
            f"{OP[kind]}: got {seen}, scale {scale}; expected x fp16 or bf16, bits int8, of one shape and device, contiguous, "
            "and a scale above 0"
        )
    if x.numel():
        rows = x.numel() // x.shape[-1]
        constants = {"KIND": kind, "D": x.shape[-1], "BLOCK": BLOCK}
        quantize_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, bits, rows, scale, **constants, num_warps=NUM_WARPS)


@functools.cache
def compile_cubin(kind: Kind, capability: int, dtype: str, dim: int) -> Cubin:
    """For an SM such as 89; ValueError for one without such numbers, and for a dtype that is not in TYPES. dim: D."""
    check_target(kind, OP[kind], capability)
    if dtype not in TYPES or dim < 1:
        raise ValueError(f"{OP[kind]}: got dtype {dtype!r}, rows of {dim}; expected one of {', '.join(TYPES)}, at least 1")
    pointers = {"x": f"*{dtype}", "bits": "*i8"}
    constants = {"KIND": kind, "D": dim, "BLOCK": BLOCK}
    return cubin.compile_cubin(
        quantize_kernel,
        capability,
        op=OP[kind],
        signature=pointers | {"rows": "i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=NUM_WARPS,
    )


def compile_cubins(kind: Kind, targets: Iterable[str], dtype: str, dim: int, rank: int, scale: float) -> dict[str, str | bytes]:
    """Every attribute of a node for the GPU architectures `targets` ("sm89", "sm90", ...). x: (…, dim), of `rank` dimensions.

    Raises ValueError as `compile_cubin` does, and for fewer than 2 dimensions.
    """
    if rank < 2:
        raise ValueError(f"{OP[kind]}: got x of {rank} dimensions; expected 2 or more")
    leading = [["dim", 0, axis] for axis in range(rank - 1)]
    rows = functools.reduce(lambda product, size: ["mul", product, size], leading)
    return cubin.attributes(
        OP[kind],
        targets,
        lambda capability: compile_cubin(kind, capability, dtype, dim),
        inputs=[dtype],
        outputs=[Output(type="int8", shape=[*leading, dim])],
        grid=[["ceildiv", ["mul", rows, dim], BLOCK], 1, 1],
        args=[["in", 0], ["out", 0], ["i32", rows], ["f32", scale]],
    )
