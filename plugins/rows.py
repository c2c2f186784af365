"""A row of D channels in a program's registers, in one tensor or two.

Triton's tensors have powers of two of elements. For Sana's 1152 and 2240 channels these are 2048 and 4096, nearly half of which
hold nothing and take registers and instructions all the same. In two tensors, HEAD and TAIL, of 1024 and 128, or 2048 and 256,
little does: measured on an H200, a norm of 2048 rows to FP8 takes 6.3 us with 1152 channels, not 7.8, and 11.3 with 2240, not 13.0.

A kernel has HEAD and TAIL as constants; it computes with row_part(0, HEAD, D) and, where TAIL is not 0, row_part(HEAD, TAIL, D).
"""

import triton
import triton.language as tl

__all__ = ["MAX_WARPS", "head_and_tail", "modulation_row", "num_warps", "row_part", "summed", "write_part"]

MAX_WARPS = 16  # of a program


def head_and_tail(dim: int) -> dict[str, int]:
    """HEAD and TAIL, powers of two, of D channels, at least 1 else ValueError; TAIL is 0 where two would have as many as one."""
    if dim < 1:
        raise ValueError(f"got rows of {dim} channels; expected at least 1")
    head = triton.next_power_of_2(dim + 1) // 2  # the last one up to D
    tail = triton.next_power_of_2(dim - head) if dim > head else 0
    return {"HEAD": head, "TAIL": tail} if tail < head else {"HEAD": 2 * head, "TAIL": 0}


def num_warps(dim: int, channels: int) -> int:
    """The fewest, a power of two, whose threads have that many channels each at most; never more than MAX_WARPS."""
    return min(triton.next_power_of_2(-(-dim // (32 * channels))), MAX_WARPS)


@triton.jit
def row_part(START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """(SIZE,) each: the numbers of channels, and which of them there are."""
    d = START + tl.arange(0, SIZE)
    return d, d < D


@triton.jit
def modulation_row(time, table, image, d, live, ROW: tl.constexpr, TIME_ROWS: tl.constexpr, D: tl.constexpr):
    """fp32, of a part of a row: the sum of a row of the table (…, D) and of the time (B, TIME_ROWS D)."""
    time_row = tl.load(time + (image * TIME_ROWS + ROW % TIME_ROWS) * D + d, mask=live, other=0.0)
    table_row = tl.load(table + ROW * D + d, mask=live, other=0.0)
    return table_row.to(tl.float32) + time_row.to(tl.float32)


@triton.jit
def summed(
    x,
    branch,
    time,
    table,
    image,
    row,
    GATE: tl.constexpr,
    TIME_ROWS: tl.constexpr,
    LARGEST: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """x + gate branch, fp32, of a part of a row; 0 where there are no channels. GATE: a row of table and time, or -1 for none.
    LARGEST: to which branch is cut, or None."""
    d, live = row_part(START, SIZE, D)
    added = tl.load(branch + row * D + d, mask=live, other=0.0).to(tl.float32)
    if LARGEST is not None:  # not tl.clamp: a NaN has to stay one
        added = tl.where(added > LARGEST, LARGEST, tl.where(added < -LARGEST, -LARGEST, added))
    if GATE >= 0:
        added *= modulation_row(time, table, image, d, live, GATE, TIME_ROWS, D)
    return tl.load(x + row * D + d, mask=live, other=0.0).to(tl.float32) + added


@triton.jit
def write_part(tensor, row, part, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    d, live = row_part(START, SIZE, D)
    tl.store(tensor + row * D + d, part.to(tensor.dtype.element_ty), mask=live)
