"""A gated residual sum in front of an FP8 product: the sum and its quantisation in one pass, and its cubins.

    hidden = x + gate clip(branch),  bits and scale: hidden, quantised as in plugins/fp8_quantize.py

clip is to fp16's largest number, 65504, as Sana's self-attention has it: what a product in fp16 overflowed to is no infinity.
TensorRT makes one kernel of the sum and the clip; a program that has one row of D in its registers also finds the row's scale, so
that hidden, rounded to fp16, is written and not read again.

Only graphs for TensorRT have such nodes, which export/fp8_nodes.py puts there, so no function body is needed. The meaning is
`gated_sum_truth` below.

Dimensions: B images, N tokens, D channels, R rows of a table. x, branch, hidden (B, N, D) fp16; bits (B, N, D) int8; scale (B, N)
fp32; table (R, D) and time (B, R D) fp16, whose sum has the gate in a row.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.fp8_quantize import check_target, magnitude, row_scale, write_bits
from plugins.launch import Output
from plugins.rows import head_and_tail, num_warps, row_part, summed, write_part

if TYPE_CHECKING:
    import torch

__all__ = ["DOMAIN", "INPUTS", "LARGEST", "OP", "compile_cubin", "compile_cubins", "gated_sum_truth", "launch"]

OP = "Fp8GatedSum"
DOMAIN = "sana"
INPUTS = ("x", "branch", "time", "table")
LARGEST = tl.constexpr(65504.0)  # of fp16
# A thread, at most: with one warp 2048 rows of 2240 take 7.7 us, not 8.7 (H200; benchmarks/results/kernel_plans_h200.json).
CHANNELS = 72


def gated_sum_truth(
    x: "torch.Tensor", branch: "torch.Tensor", time: "torch.Tensor", table: "torch.Tensor", row: int
) -> "torch.Tensor":
    """hidden, at the inputs' precision."""
    gate = table[row] + time.unflatten(1, table.shape)[:, row, None]
    return x + gate * branch.clip(-LARGEST.value, LARGEST.value)


@triton.jit
def _write(hidden, bits, row, part, inverse, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    write_part(hidden, row, part, START, SIZE, D)
    write_bits(bits, row, part, inverse, START, SIZE, D)


@triton.jit
def sum_kernel(
    x,
    branch,
    time,
    table,
    hidden,
    bits,
    scale,
    tokens,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A program: one token."""
    row = tl.program_id(0).to(tl.int64)  # int64: 64 images of 4096 px pass 2**31 elements
    image = tl.program_id(0) // tokens
    head = summed(x, branch, time, table, image, row, ROW, ROWS, LARGEST, 0, HEAD, D).to(x.dtype.element_ty)
    largest = magnitude(head, row_part(0, HEAD, D)[1])
    if TAIL > 0:
        tail = summed(x, branch, time, table, image, row, ROW, ROWS, LARGEST, HEAD, TAIL, D).to(x.dtype.element_ty)
        largest = tl.maximum(largest, magnitude(tail, row_part(HEAD, TAIL, D)[1]))
    own_scale, inverse = row_scale(largest)
    tl.store(scale + row, own_scale)
    _write(hidden, bits, row, head, inverse, 0, HEAD, D)
    if TAIL > 0:
        _write(hidden, bits, row, tail, inverse, HEAD, TAIL, D)


def _constants(dim: int, row: int, rows: int) -> dict[str, int]:
    if dim < 1 or not 0 <= row < rows:
        raise ValueError(f"{OP}: got rows of {dim} channels, gate {row} of {rows}; expected at least 1, and a row that there is")
    return {"ROW": row, "ROWS": rows, "D": dim, **head_and_tail(dim)}


def launch(
    inputs: "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]",
    outputs: "tuple[torch.Tensor, torch.Tensor, torch.Tensor]",
    row: int,
) -> None:
    """Write the outputs hidden, bits and scale of the inputs x, branch, time and table: shapes and types as in the module's
    docstring, all contiguous, on the current GPU, else ValueError."""
    x, _, _, table = inputs
    batch, tokens, dim = x.shape
    rows = table.shape[0]
    half, tensors = "torch.float16", (*inputs, *outputs)
    kinds = [(x.shape, half)] * 2 + [((batch, rows * dim), half), ((rows, dim), half)]
    kinds += [(x.shape, half), (x.shape, "torch.int8"), (x.shape[:-1], "torch.float32")]
    if [(t.shape, str(t.dtype)) for t in tensors] != kinds or not all(t.is_contiguous() and t.device == x.device for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            f"{OP}: got {seen}; expected twice (B, N, D), (B, R D), (R, D), (B, N, D) fp16, (B, N, D) int8, (B, N) fp32, all "
            "contiguous"
        )
    if x.numel() == 0:
        return
    sum_kernel[(batch * tokens,)](*tensors, tokens, **_constants(dim, row, rows), num_warps=num_warps(dim, CHANNELS))


@functools.cache
def compile_cubin(capability: int, dim: int, row: int, rows: int) -> Cubin:
    """For an SM such as 89; ValueError for an older one."""
    check_target(OP, capability)
    constants = _constants(dim, row, rows)
    pointers = dict.fromkeys((*INPUTS, "hidden"), "*fp16") | {"bits": "*i8", "scale": "*fp32"}
    return cubin.compile_cubin(
        sum_kernel,
        capability,
        op=OP,
        signature=pointers | {"tokens": "i32"} | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=num_warps(dim, CHANNELS),
    )


def compile_cubins(targets: Iterable[str], dim: int, row: int, rows: int) -> dict[str, str | bytes]:
    """Every attribute of a `sana::Fp8GatedSum` node for the GPU architectures `targets` ("sm89", "sm90", ...).

    dim: D. row: of the gate, of `rows` in table and time. Raises ValueError for a row that is not there and a target before sm89.
    """
    shape = [["dim", 0, axis] for axis in range(2)]
    whole = [*shape, dim]
    return cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dim, row, rows),
        inputs=["fp16"] * len(INPUTS),
        outputs=[Output(type="fp16", shape=whole), Output(type="int8", shape=whole), Output(type="fp32", shape=shape)],
        grid=[["mul", *shape], 1, 1],
        args=[*(["in", index] for index in range(4)), *(["out", index] for index in range(3)), ["i32", shape[1]]],
    )
