"""The middle of Sana's mix-FFN, SiLU, depth-wise 3x3 and gate, as one Triton kernel forward and two backward.

Its meaning is `gated_depthwise_conv_truth` in train/ops.py:

    y = a silu(g), where [a, g] = depthwise3x3(silu(x)) + bias, with zeros around the picture

Operator by operator it is bound by memory, and reads and writes its widest tensors several times. Here x is read once and y
written once. Backward, the first kernel computes a and g again and writes the gradient of the convolution's result, the second
turns that into the gradients of x, the filters and the bias. A program walks down a strip of a few columns and keeps the three
rows under the filter in registers, filters too: a row is read and its SiLU computed once for each of the three columns of the
filter, not for all nine taps, for the exponentials alone would then take longer than the memory. Sums over pixels are left by each
program in a place of its own and added up by PyTorch: the same bytes in every run.

Dimensions: B pictures, H x W pixels, E channels of a half, C = 2E channels; in a program W columns and C channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

BLOCK_W = 8  # columns of a program; the two beside them are read as well, from cache
BLOCK_C = 64  # channels of a program: 128 B of half precision, a whole line of the cache
NUM_WARPS = 8  # so that a thread has 2 channels of one column: the filters of more would not fit in its registers
OPTIONS = {"enable_fp_fusion": True}  # a product and its sum as one instruction: said, for Triton 3.10 changes its default
ROWS = 32  # that a program walks down at most; two more are read


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_slope(x):
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _shifted(source, picture, row, columns_W, channels_C, live_C, height, width, stride, SHIFT: tl.constexpr):
    """A row's columns, moved by SHIFT: (W, C), zero outside the picture."""
    from_W = columns_W + SHIFT
    end = tl.where((row >= 0) & (row < height), width, 0)  # no columns in a row outside
    live = live_C[None, :] & ((from_W >= 0) & (from_W < end))[:, None]
    start = (picture.to(tl.int64) * height + row) * width * stride  # int64: 64 pictures of 32 x 32 tokens pass 2**29 elements
    return tl.load(source + start + from_W[:, None] * stride + channels_C[None, :], mask=live, other=0.0)


@triton.jit
def _row(source, picture, row, columns_W, channels_C, live_C, height, width, stride):
    """What the three columns of the filter see of a row."""
    left = _shifted(source, picture, row, columns_W, channels_C, live_C, height, width, stride, -1)
    here = _shifted(source, picture, row, columns_W, channels_C, live_C, height, width, stride, 0)
    right = _shifted(source, picture, row, columns_W, channels_C, live_C, height, width, stride, 1)
    return left, here, right


@triton.jit
def _silu_row(row):
    return _silu(row[0].to(tl.float32)), _silu(row[1].to(tl.float32)), _silu(row[2].to(tl.float32))


@triton.jit
def _wide_row(row):
    return row[0].to(tl.float32), row[1].to(tl.float32), row[2].to(tl.float32)


@triton.jit
def _taps(taps, row: tl.constexpr, channels_C, live_C, channels):
    """Three taps of a filter's row, (1, C) each."""
    at = taps + 3 * row * channels + channels_C
    left = tl.load(at, mask=live_C, other=0.0)[None, :]
    here = tl.load(at + channels, mask=live_C, other=0.0)[None, :]
    right = tl.load(at + 2 * channels, mask=live_C, other=0.0)[None, :]
    return left, here, right


@triton.jit
def _dot(taps, row):
    return taps[0] * row[0] + taps[1] * row[1] + taps[2] * row[2]


@triton.jit
def gate_kernel(
    x, taps, bias, dy, out, height, width, inner, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr
):
    """out: y (B, H, W, E); if BACKWARD, the gradient of the convolution's result (B, H, W, 2E). taps (9, 2E), bias (2E,): fp32."""
    channels_C = tl.program_id(0) * C + tl.arange(0, C)
    gates_C, live_C = channels_C + inner, channels_C < inner
    num_strips = tl.cdiv(width, W)
    columns_W = tl.program_id(1) % num_strips * W + tl.arange(0, W)
    first = tl.program_id(1) // num_strips * ROWS
    picture, channels = tl.program_id(2), 2 * inner

    a0, g0 = _taps(taps, 0, channels_C, live_C, channels), _taps(taps, 0, gates_C, live_C, channels)
    a1, g1 = _taps(taps, 1, channels_C, live_C, channels), _taps(taps, 1, gates_C, live_C, channels)
    a2, g2 = _taps(taps, 2, channels_C, live_C, channels), _taps(taps, 2, gates_C, live_C, channels)
    bias_a = tl.load(bias + channels_C, mask=live_C, other=0.0)[None, :]
    bias_g = tl.load(bias + gates_C, mask=live_C, other=0.0)[None, :]

    above_a = _silu_row(_row(x, picture, first - 1, columns_W, channels_C, live_C, height, width, channels))
    above_g = _silu_row(_row(x, picture, first - 1, columns_W, gates_C, live_C, height, width, channels))
    level_a = _silu_row(_row(x, picture, first, columns_W, channels_C, live_C, height, width, channels))
    level_g = _silu_row(_row(x, picture, first, columns_W, gates_C, live_C, height, width, channels))
    # Loads are a row ahead of their use, so that their latency is hidden: the compiler moves none before a store.
    ahead_a = _row(x, picture, first + 1, columns_W, channels_C, live_C, height, width, channels)
    ahead_g = _row(x, picture, first + 1, columns_W, gates_C, live_C, height, width, channels)
    for row in range(first, min(first + ROWS, height)):
        below_a, below_g = _silu_row(ahead_a), _silu_row(ahead_g)
        ahead_a = _row(x, picture, row + 2, columns_W, channels_C, live_C, height, width, channels)
        ahead_g = _row(x, picture, row + 2, columns_W, gates_C, live_C, height, width, channels)
        live = (columns_W < width)[:, None] & live_C[None, :]
        pixels_W1 = ((picture.to(tl.int64) * height + row) * width + columns_W)[:, None]
        if BACKWARD:
            dy_WC = tl.load(dy + pixels_W1 * inner + channels_C[None, :], mask=live, other=0.0).to(tl.float32)
        a_WC = bias_a + _dot(a0, above_a) + _dot(a1, level_a) + _dot(a2, below_a)
        g_WC = bias_g + _dot(g0, above_g) + _dot(g1, level_g) + _dot(g2, below_g)
        if BACKWARD:
            da_WC, dg_WC = dy_WC * _silu(g_WC), dy_WC * a_WC * _silu_slope(g_WC)
            tl.store(out + pixels_W1 * channels + channels_C[None, :], da_WC.to(out.dtype.element_ty), mask=live)
            tl.store(out + pixels_W1 * channels + gates_C[None, :], dg_WC.to(out.dtype.element_ty), mask=live)
        else:
            y_WC = a_WC * _silu(g_WC)
            tl.store(out + pixels_W1 * inner + channels_C[None, :], y_WC.to(out.dtype.element_ty), mask=live)
        above_a, above_g, level_a, level_g = level_a, level_g, below_a, below_g


@triton.jit
def _gather(sums, rows, with_WC):
    return sums[0] + rows[2] * with_WC, sums[1] + rows[1] * with_WC, sums[2] + rows[0] * with_WC


@triton.jit
def _leave(at, sums, channels_C, live_C, channels):
    tl.store(at + channels_C, tl.sum(sums[0], axis=0), mask=live_C)
    tl.store(at + channels + channels_C, tl.sum(sums[1], axis=0), mask=live_C)
    tl.store(at + 2 * channels + channels_C, tl.sum(sums[2], axis=0), mask=live_C)


@triton.jit
def gradient_kernel(dconv, x, taps, dx, sums, height, width, channels, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """dx (B, H, W, 2E) from dconv and x of that shape; sums (programs, 10, 2E) fp32: of the nine taps and of the bias.

    A pixel of x reaches the nine pixels around it, each through the tap on the other side of the filter's centre.
    """
    channels_C = tl.program_id(0) * C + tl.arange(0, C)
    live_C = channels_C < channels
    num_strips = tl.cdiv(width, W)
    columns_W = tl.program_id(1) % num_strips * W + tl.arange(0, W)
    first = tl.program_id(1) // num_strips * ROWS
    picture = tl.program_id(2)

    t0 = _taps(taps, 0, channels_C, live_C, channels)
    t1 = _taps(taps, 1, channels_C, live_C, channels)
    t2 = _taps(taps, 2, channels_C, live_C, channels)
    zero_WC = tl.zeros((W, C), tl.float32)
    sums0, sums1, sums2, sum_WC = (zero_WC, zero_WC, zero_WC), (zero_WC, zero_WC, zero_WC), (zero_WC, zero_WC, zero_WC), zero_WC
    above = _wide_row(_row(dconv, picture, first - 1, columns_W, channels_C, live_C, height, width, channels))
    level = _wide_row(_row(dconv, picture, first, columns_W, channels_C, live_C, height, width, channels))
    ahead = _row(dconv, picture, first + 1, columns_W, channels_C, live_C, height, width, channels)
    ahead_x = _shifted(x, picture, first, columns_W, channels_C, live_C, height, width, channels, 0)
    for row in range(first, min(first + ROWS, height)):
        below, x_WC = _wide_row(ahead), ahead_x.to(tl.float32)
        ahead = _row(dconv, picture, row + 2, columns_W, channels_C, live_C, height, width, channels)
        ahead_x = _shifted(x, picture, row + 1, columns_W, channels_C, live_C, height, width, channels, 0)
        back_WC = t0[2] * below[0] + t0[1] * below[1] + t0[0] * below[2]
        back_WC += t1[2] * level[0] + t1[1] * level[1] + t1[0] * level[2]
        back_WC += t2[2] * above[0] + t2[1] * above[1] + t2[0] * above[2]
        pixels_W1 = ((picture.to(tl.int64) * height + row) * width + columns_W)[:, None]
        live = (columns_W < width)[:, None] & live_C[None, :]
        dx_WC = back_WC * _silu_slope(x_WC)
        tl.store(dx + pixels_W1 * channels + channels_C[None, :], dx_WC.to(dx.dtype.element_ty), mask=live)
        silu_WC = _silu(x_WC)  # zero outside the picture
        sums0, sums1, sums2 = _gather(sums0, below, silu_WC), _gather(sums1, level, silu_WC), _gather(sums2, above, silu_WC)
        sum_WC += level[1]
        above, level = level, below
    program = (picture * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    at = sums + program * 10 * channels
    _leave(at, sums0, channels_C, live_C, channels)
    _leave(at + 3 * channels, sums1, channels_C, live_C, channels)
    _leave(at + 6 * channels, sums2, channels_C, live_C, channels)
    tl.store(at + 9 * channels + channels_C, tl.sum(sum_WC, axis=0), mask=live_C)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """grid in programs: of channels, of strips in a picture, of pictures."""

    grid: tuple[int, int, int]
    rows: int
    num_warps: int


def plan(*, batch: int, height: int, width: int, channels: int) -> LaunchPlan:
    """For a kernel that walks over (batch, height, width, channels)."""
    strips = -(-width // BLOCK_W) * -(-height // ROWS)
    return LaunchPlan(grid=(-(-channels // BLOCK_C), strips, batch), rows=ROWS, num_warps=NUM_WARPS)


def _check(*tensors: "torch.Tensor") -> None:
    if not all(t.is_contiguous() and t.dtype == tensors[0].dtype and t.device == tensors[0].device for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(f"gated_depthwise_conv: got {seen}; expected one dtype and device, all contiguous")


def _parameters(weight: "torch.Tensor", bias: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """taps (9, 2E), bias (2E,): fp32, channels side by side, as threads read them."""
    return weight.flatten(1).t().float().contiguous(), bias.float().contiguous()


def launch(x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor", y: "torch.Tensor") -> None:
    """Write the op's result into y (B, H, W, E). x (B, H, W, 2E), of y's dtype; weight (2E, 1, 3, 3), bias (2E,) of any.

    x and y: contiguous, of bf16, fp16 or fp32, on the current GPU, else ValueError.
    """
    _check(x, y)
    batch, height, width, inner = y.shape
    if y.numel() == 0:
        return
    taps, bias = _parameters(weight, bias)
    tile = plan(batch=batch, height=height, width=width, channels=inner)
    shape = {"ROWS": tile.rows, "W": BLOCK_W, "C": BLOCK_C}
    gate_kernel[tile.grid](x, taps, bias, y, y, height, width, inner, **shape, BACKWARD=False, **OPTIONS, num_warps=tile.num_warps)


def launch_backward(
    dy: "torch.Tensor", x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor", dx: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Write the gradient of x into dx; return those of weight and bias, in their dtypes. dy: as y of `launch`, dx: as x."""
    import torch

    _check(dy, x, dx)
    batch, height, width, inner = dy.shape
    if dy.numel() == 0:
        dx.zero_()
        return torch.zeros_like(weight), torch.zeros_like(bias)
    channels = 2 * inner
    taps, wide_bias = _parameters(weight, bias)
    dconv = torch.empty_like(x)
    tile = plan(batch=batch, height=height, width=width, channels=inner)
    shape = {"ROWS": tile.rows, "W": BLOCK_W, "C": BLOCK_C}
    gate_kernel[tile.grid](
        x, taps, wide_bias, dy, dconv, height, width, inner, **shape, BACKWARD=True, **OPTIONS, num_warps=tile.num_warps
    )
    tile = plan(batch=batch, height=height, width=width, channels=channels)
    sums = torch.empty(tile.grid[1] * batch, 10, channels, device=x.device, dtype=torch.float32)
    gradient_kernel[tile.grid](dconv, x, taps, dx, sums, height, width, channels, **shape, **OPTIONS, num_warps=tile.num_warps)
    total = sums.sum(0)
    return total[:9].t().reshape(weight.shape).to(weight.dtype).contiguous(), total[9].to(bias.dtype)
