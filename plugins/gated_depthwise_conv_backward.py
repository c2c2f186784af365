"""The gradient of `gated_depthwise_conv` as two Triton kernels, for training on a GPU.

The first, the forward kernel told so, computes a and g again and writes the gradient of the convolution's result; the second turns
that into the gradients of x, the filters and the bias. Sums over pixels are left by each program in a place of its own and added up
by PyTorch: the same bytes in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from plugins.gated_depthwise_conv import check, plan
from plugins.gated_depthwise_conv_kernel import add_dots, four, gate_kernel, live_at, picture_at, six, taps, wide, wide_row
from plugins.silu import silu, silu_slope

__all__ = ["launch"]


@triton.jit
def _gather(sums, row, columns):
    """Sums of a row of taps: what four columns of silu(x) meet in a row of six."""
    s0 = sums[0] + row[2] * columns[0] + row[3] * columns[1] + row[4] * columns[2] + row[5] * columns[3]
    s1 = sums[1] + row[1] * columns[0] + row[2] * columns[1] + row[3] * columns[2] + row[4] * columns[3]
    s2 = sums[2] + row[0] * columns[0] + row[1] * columns[1] + row[2] * columns[2] + row[3] * columns[3]
    return s0, s1, s2


@triton.jit
def _leave(at, sums, channels_C, live_C, channels):
    tl.store(at + channels_C, sums[0], mask=live_C)
    tl.store(at + channels + channels_C, sums[1], mask=live_C)
    tl.store(at + 2 * channels + channels_C, sums[2], mask=live_C)


@triton.jit
def _store_dx(dx, row, column, width, channels, channels_C, live_C, back, x):
    gradient = (back * silu_slope(x)).to(dx.dtype.element_ty)
    tl.store(dx + (row * width + column) * channels + channels_C, gradient, mask=live_at(column, width, channels_C, live_C))


@triton.jit
def gradient_kernel(dconv, x, weight, dx, sums, height, width, channels, rows, C: tl.constexpr):
    """dx (B, H, W, 2E) from dconv and x of that shape; sums (programs, 10, 2E) fp32: of the nine taps and of the bias.

    A pixel of x reaches the nine pixels around it, each through the tap on the other side of the filter's centre.
    """
    channels_C = tl.program_id(0) * C + tl.arange(0, C)
    live_C = channels_C < channels
    num_strips = tl.cdiv(width, 4)
    column = tl.program_id(1) % num_strips * 4
    first = tl.program_id(1) // num_strips * rows
    picture = tl.program_id(2)
    dconv = picture_at(dconv, picture, height, width, channels)
    x = picture_at(x, picture, height, width, channels)
    dx = picture_at(dx, picture, height, width, channels)

    left, here, right = taps(weight, 0, channels, channels_C, live_C)
    t0 = (right, here, left)
    left, here, right = taps(weight, 1, channels, channels_C, live_C)
    t1 = (right, here, left)
    left, here, right = taps(weight, 2, channels, channels_C, live_C)
    t2 = (right, here, left)
    zero_C = tl.zeros((C,), tl.float32)
    zeros = (zero_C, zero_C, zero_C, zero_C)
    sums0, sums1, sums2, sum_C = (zero_C, zero_C, zero_C), (zero_C, zero_C, zero_C), (zero_C, zero_C, zero_C), zero_C
    above = wide_row(six(dconv, first - 1, column, height, width, channels, channels_C, live_C))
    level = wide_row(six(dconv, first, column, height, width, channels, channels_C, live_C))
    ahead = six(dconv, first + 1, column, height, width, channels, channels_C, live_C)
    ahead_x = four(x, first, column, height, width, channels, channels_C, live_C)
    for row in range(first, min(first + rows, height)):
        below = wide_row(ahead)
        x0, x1, x2, x3 = wide(ahead_x[0]), wide(ahead_x[1]), wide(ahead_x[2]), wide(ahead_x[3])
        ahead = six(dconv, row + 2, column, height, width, channels, channels_C, live_C)
        ahead_x = four(x, row + 1, column, height, width, channels, channels_C, live_C)
        back = add_dots(add_dots(add_dots(zeros, t0, below), t1, level), t2, above)
        _store_dx(dx, row, column, width, channels, channels_C, live_C, back[0], x0)
        _store_dx(dx, row, column + 1, width, channels, channels_C, live_C, back[1], x1)
        _store_dx(dx, row, column + 2, width, channels, channels_C, live_C, back[2], x2)
        _store_dx(dx, row, column + 3, width, channels, channels_C, live_C, back[3], x3)
        columns = (silu(x0), silu(x1), silu(x2), silu(x3))  # zero outside the picture
        sums0, sums1, sums2 = _gather(sums0, below, columns), _gather(sums1, level, columns), _gather(sums2, above, columns)
        sum_C += level[1] + level[2] + level[3] + level[4]
        above, level = level, below
    program = (picture * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    at = sums + program * 10 * channels
    _leave(at, sums0, channels_C, live_C, channels)
    _leave(at + 3 * channels, sums1, channels_C, live_C, channels)
    _leave(at + 6 * channels, sums2, channels_C, live_C, channels)
    tl.store(at + 9 * channels + channels_C, sum_C, mask=live_C)


def launch(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient of x into dx; return those of weight and bias, in their dtypes.

    dy (B, H, W, E), x and dx (B, H, W, 2E): contiguous, of one dtype, on the current GPU, else ValueError.
    """
    batch, height, width, inner = dy.shape
    check(x, weight, bias, dy, dx, inner=inner)
    if dy.numel() == 0:
        dx.zero_()
        return torch.zeros_like(weight), torch.zeros_like(bias)
    channels = 2 * inner
    weight, bias = weight.contiguous(), bias.contiguous()
    dconv = torch.empty_like(x)
    size = {"batch": batch, "height": height, "width": width}
    programs, options = plan(**size, channels=inner)
    gate_kernel[programs](x, weight, bias, dy, dconv, None, height, width, out_scale=None, inner=inner, BACKWARD=True, **options)
    programs, options = plan(**size, channels=channels)
    sums = torch.empty(programs[1] * batch, 10, channels, device=x.device, dtype=torch.float32)
    gradient_kernel[programs](dconv, x, weight, dx, sums, height, width, channels, **options)
    total = sums.sum(0)
    return total[:9].reshape(weight.shape).to(weight.dtype), total[9].to(bias.dtype)
