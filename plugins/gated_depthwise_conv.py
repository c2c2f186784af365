"""The middle of Sana's mix-FFN, SiLU, depth-wise 3x3 and gate, as one Triton kernel forward and two backward.

Its meaning is `gated_depthwise_conv_truth` in train/ops.py:

    y = a silu(g), where [a, g] = depthwise3x3(silu(x)) + bias, with zeros around the picture

Operator by operator it is bound by memory, and reads and writes its widest tensors several times. Here x is read once and y
written once. Backward, the first kernel computes a and g again and writes the gradient of the convolution's result, the second
turns that into the gradients of x, the filters and the bias. A program walks down a strip of four columns; a thread has a few
channels of all of them, so that the columns to the left and right are in its own registers, each row is read once and its SiLU
computed once (half as often again for the two columns beside the strip): computed for every tap, the exponentials alone would take
longer than the memory. Sums over pixels are left by each program in a place of its own and added up by PyTorch: the same bytes in
every run.

Dimensions: B pictures, H x W pixels, E channels of a half; in a program C channels. A row is a tuple: of the strip's four columns,
or of six, with the one to the left and the one to the right.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

COLUMNS = 4  # of a strip: written out below
ROWS = 32  # that a program walks down at most; two more are read
BLOCK_C, NUM_WARPS = 128, 2  # channels and warps of a program: two channels a thread, the fastest of those tried for each kernel


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_slope(x):
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _picture(tensor, picture, height, width, stride):
    """Pointer to a picture. int64: 64 pictures of 32 x 32 tokens pass 2**29 elements; one alone stays below 2**31."""
    return tensor + picture.to(tl.int64) * height * width * stride


@triton.jit
def _live(column, end, channels_C, live_C):
    """Where live, and the column is from 0 to end - 1."""
    column_C = tl.zeros_like(channels_C) + column  # a scalar condition in a mask is more than Triton's interpreter takes
    return live_C & (column_C >= 0) & (column_C < end)


@triton.jit
def _pixel(picture, row, column, height, width, stride, channels_C, live_C):
    """(C,), zero outside the picture."""
    end = tl.where((row >= 0) & (row < height), width, 0)  # no columns in a row outside
    live_C = _live(column, end, channels_C, live_C)
    return tl.load(picture + (row * width + column) * stride + channels_C, mask=live_C, other=0.0)


@triton.jit
def _four(picture, row, column, height, width, stride, channels_C, live_C):
    p0 = _pixel(picture, row, column, height, width, stride, channels_C, live_C)
    p1 = _pixel(picture, row, column + 1, height, width, stride, channels_C, live_C)
    p2 = _pixel(picture, row, column + 2, height, width, stride, channels_C, live_C)
    p3 = _pixel(picture, row, column + 3, height, width, stride, channels_C, live_C)
    return p0, p1, p2, p3


@triton.jit
def _six(picture, row, column, height, width, stride, channels_C, live_C):
    left = _pixel(picture, row, column - 1, height, width, stride, channels_C, live_C)
    p0, p1, p2, p3 = _four(picture, row, column, height, width, stride, channels_C, live_C)
    right = _pixel(picture, row, column + 4, height, width, stride, channels_C, live_C)
    return left, p0, p1, p2, p3, right


@triton.jit
def _wide(x):
    return x.to(tl.float32)


@triton.jit
def _wide_row(row):
    return _wide(row[0]), _wide(row[1]), _wide(row[2]), _wide(row[3]), _wide(row[4]), _wide(row[5])


@triton.jit
def _silu_row(row):
    wide = _wide_row(row)
    return _silu(wide[0]), _silu(wide[1]), _silu(wide[2]), _silu(wide[3]), _silu(wide[4]), _silu(wide[5])


@triton.jit
def _taps(taps, row: tl.constexpr, channels_C, live_C, channels):
    """Three taps of a filter's row, (C,) each."""
    at = taps + 3 * row * channels + channels_C
    left = tl.load(at, mask=live_C, other=0.0)
    here = tl.load(at + channels, mask=live_C, other=0.0)
    right = tl.load(at + 2 * channels, mask=live_C, other=0.0)
    return left, here, right


@triton.jit
def _add_dots(sums, taps, row):
    """sums, of four columns, + a row of the filter on a row of six."""
    s0 = sums[0] + taps[0] * row[0] + taps[1] * row[1] + taps[2] * row[2]
    s1 = sums[1] + taps[0] * row[1] + taps[1] * row[2] + taps[2] * row[3]
    s2 = sums[2] + taps[0] * row[2] + taps[1] * row[3] + taps[2] * row[4]
    s3 = sums[3] + taps[0] * row[3] + taps[1] * row[4] + taps[2] * row[5]
    return s0, s1, s2, s3


@triton.jit
def _store_gradients(conv, row, column, width, channels, channels_C, gates_C, live_C, dy, a, g):
    live = _live(column, width, channels_C, live_C)
    pixel = conv + (row * width + column) * channels
    tl.store(pixel + channels_C, (dy * _silu(g)).to(conv.dtype.element_ty), mask=live)
    tl.store(pixel + gates_C, (dy * a * _silu_slope(g)).to(conv.dtype.element_ty), mask=live)


@triton.jit
def _store_gated(y, row, column, width, inner, channels_C, live_C, a, g):
    gated = (a * _silu(g)).to(y.dtype.element_ty)
    tl.store(y + (row * width + column) * inner + channels_C, gated, mask=_live(column, width, channels_C, live_C))


@triton.jit
def gate_kernel(x, taps, bias, dy, out, height, width, inner, ROWS: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr):
    """out: y (B, H, W, E); if BACKWARD, the gradient of the convolution's result (B, H, W, 2E). taps (9, 2E), bias (2E,): fp32."""
    channels_C = tl.program_id(0) * C + tl.arange(0, C)
    gates_C, live_C = channels_C + inner, channels_C < inner
    num_strips = tl.cdiv(width, 4)
    column = tl.program_id(1) % num_strips * 4
    first = tl.program_id(1) // num_strips * ROWS
    picture, channels = tl.program_id(2), 2 * inner
    x = _picture(x, picture, height, width, channels)
    if BACKWARD:
        dy = _picture(dy, picture, height, width, inner)
        out = _picture(out, picture, height, width, channels)
    else:
        out = _picture(out, picture, height, width, inner)

    a0, g0 = _taps(taps, 0, channels_C, live_C, channels), _taps(taps, 0, gates_C, live_C, channels)
    a1, g1 = _taps(taps, 1, channels_C, live_C, channels), _taps(taps, 1, gates_C, live_C, channels)
    a2, g2 = _taps(taps, 2, channels_C, live_C, channels), _taps(taps, 2, gates_C, live_C, channels)
    bias_a = tl.load(bias + channels_C, mask=live_C, other=0.0)
    bias_g = tl.load(bias + gates_C, mask=live_C, other=0.0)
    start_a, start_g = (bias_a, bias_a, bias_a, bias_a), (bias_g, bias_g, bias_g, bias_g)

    # Of the row of results under way all but the last row of taps is summed up, of the next one the first row of taps.
    row_a = _silu_row(_six(x, first - 1, column, height, width, channels, channels_C, live_C))
    row_g = _silu_row(_six(x, first - 1, column, height, width, channels, gates_C, live_C))
    here_a, here_g = _add_dots(start_a, a0, row_a), _add_dots(start_g, g0, row_g)
    row_a = _silu_row(_six(x, first, column, height, width, channels, channels_C, live_C))
    row_g = _silu_row(_six(x, first, column, height, width, channels, gates_C, live_C))
    here_a, here_g = _add_dots(here_a, a1, row_a), _add_dots(here_g, g1, row_g)
    next_a, next_g = _add_dots(start_a, a0, row_a), _add_dots(start_g, g0, row_g)
    # Loads are a row ahead of their use, so that their latency is hidden: the compiler moves none before a store.
    ahead_a = _six(x, first + 1, column, height, width, channels, channels_C, live_C)
    ahead_g = _six(x, first + 1, column, height, width, channels, gates_C, live_C)
    for row in range(first, min(first + ROWS, height)):
        row_a, row_g = _silu_row(ahead_a), _silu_row(ahead_g)
        ahead_a = _six(x, row + 2, column, height, width, channels, channels_C, live_C)
        ahead_g = _six(x, row + 2, column, height, width, channels, gates_C, live_C)
        a, g = _add_dots(here_a, a2, row_a), _add_dots(here_g, g2, row_g)
        here_a, here_g = _add_dots(next_a, a1, row_a), _add_dots(next_g, g1, row_g)
        next_a, next_g = _add_dots(start_a, a0, row_a), _add_dots(start_g, g0, row_g)
        if BACKWARD:
            d0, d1, d2, d3 = _four(dy, row, column, height, width, inner, channels_C, live_C)
            _store_gradients(out, row, column, width, channels, channels_C, gates_C, live_C, _wide(d0), a[0], g[0])
            _store_gradients(out, row, column + 1, width, channels, channels_C, gates_C, live_C, _wide(d1), a[1], g[1])
            _store_gradients(out, row, column + 2, width, channels, channels_C, gates_C, live_C, _wide(d2), a[2], g[2])
            _store_gradients(out, row, column + 3, width, channels, channels_C, gates_C, live_C, _wide(d3), a[3], g[3])
        else:
            _store_gated(out, row, column, width, inner, channels_C, live_C, a[0], g[0])
            _store_gated(out, row, column + 1, width, inner, channels_C, live_C, a[1], g[1])
            _store_gated(out, row, column + 2, width, inner, channels_C, live_C, a[2], g[2])
            _store_gated(out, row, column + 3, width, inner, channels_C, live_C, a[3], g[3])


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
    gradient = (back * _silu_slope(x)).to(dx.dtype.element_ty)
    tl.store(dx + (row * width + column) * channels + channels_C, gradient, mask=_live(column, width, channels_C, live_C))


@triton.jit
def gradient_kernel(dconv, x, taps, dx, sums, height, width, channels, ROWS: tl.constexpr, C: tl.constexpr):
    """dx (B, H, W, 2E) from dconv and x of that shape; sums (programs, 10, 2E) fp32: of the nine taps and of the bias.

    A pixel of x reaches the nine pixels around it, each through the tap on the other side of the filter's centre.
    """
    channels_C = tl.program_id(0) * C + tl.arange(0, C)
    live_C = channels_C < channels
    num_strips = tl.cdiv(width, 4)
    column = tl.program_id(1) % num_strips * 4
    first = tl.program_id(1) // num_strips * ROWS
    picture = tl.program_id(2)
    dconv = _picture(dconv, picture, height, width, channels)
    x = _picture(x, picture, height, width, channels)
    dx = _picture(dx, picture, height, width, channels)

    left, here, right = _taps(taps, 0, channels_C, live_C, channels)
    t0 = (right, here, left)
    left, here, right = _taps(taps, 1, channels_C, live_C, channels)
    t1 = (right, here, left)
    left, here, right = _taps(taps, 2, channels_C, live_C, channels)
    t2 = (right, here, left)
    zero_C = tl.zeros((C,), tl.float32)
    zeros = (zero_C, zero_C, zero_C, zero_C)
    sums0, sums1, sums2, sum_C = (zero_C, zero_C, zero_C), (zero_C, zero_C, zero_C), (zero_C, zero_C, zero_C), zero_C
    above = _wide_row(_six(dconv, first - 1, column, height, width, channels, channels_C, live_C))
    level = _wide_row(_six(dconv, first, column, height, width, channels, channels_C, live_C))
    ahead = _six(dconv, first + 1, column, height, width, channels, channels_C, live_C)
    ahead_x = _four(x, first, column, height, width, channels, channels_C, live_C)
    for row in range(first, min(first + ROWS, height)):
        below = _wide_row(ahead)
        x0, x1, x2, x3 = _wide(ahead_x[0]), _wide(ahead_x[1]), _wide(ahead_x[2]), _wide(ahead_x[3])
        ahead = _six(dconv, row + 2, column, height, width, channels, channels_C, live_C)
        ahead_x = _four(x, row + 1, column, height, width, channels, channels_C, live_C)
        back = _add_dots(_add_dots(_add_dots(zeros, t0, below), t1, level), t2, above)
        _store_dx(dx, row, column, width, channels, channels_C, live_C, back[0], x0)
        _store_dx(dx, row, column + 1, width, channels, channels_C, live_C, back[1], x1)
        _store_dx(dx, row, column + 2, width, channels, channels_C, live_C, back[2], x2)
        _store_dx(dx, row, column + 3, width, channels, channels_C, live_C, back[3], x3)
        columns = (_silu(x0), _silu(x1), _silu(x2), _silu(x3))  # zero outside the picture
        sums0, sums1, sums2 = _gather(sums0, below, columns), _gather(sums1, level, columns), _gather(sums2, above, columns)
        sum_C += level[1] + level[2] + level[3] + level[4]
        above, level = level, below
    program = (picture * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    at = sums + program * 10 * channels
    _leave(at, sums0, channels_C, live_C, channels)
    _leave(at + 3 * channels, sums1, channels_C, live_C, channels)
    _leave(at + 6 * channels, sums2, channels_C, live_C, channels)
    tl.store(at + 9 * channels + channels_C, sum_C, mask=live_C)


def plan(*, batch: int, height: int, width: int, channels: int) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """For a kernel that walks over (batch, height, width, channels): programs of channels, of strips in a picture and of pictures;
    and its options."""
    programs = (-(-channels // BLOCK_C), -(-width // COLUMNS) * -(-height // ROWS), batch)
    return programs, {"ROWS": ROWS, "C": BLOCK_C, "num_warps": NUM_WARPS, "enable_fp_fusion": True}


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
    programs, options = plan(batch=batch, height=height, width=width, channels=inner)
    gate_kernel[programs](x, taps, bias, y, y, height, width, inner, BACKWARD=False, **options)


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
    size = {"batch": batch, "height": height, "width": width}
    programs, options = plan(**size, channels=inner)
    gate_kernel[programs](x, taps, wide_bias, dy, dconv, height, width, inner, BACKWARD=True, **options)
    programs, options = plan(**size, channels=channels)
    sums = torch.empty(programs[1] * batch, 10, channels, device=x.device, dtype=torch.float32)
    gradient_kernel[programs](dconv, x, taps, dx, sums, height, width, channels, **options)
    total = sums.sum(0)
    return total[:9].t().reshape(weight.shape).to(weight.dtype).contiguous(), total[9].to(bias.dtype)
