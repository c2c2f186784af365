"""The Triton kernel of plugins/gated_depthwise_conv.py, which has names of dimensions too, and its parts.

A program walks down a strip of four columns; a thread has a few channels of all of them, so that the columns to the left and right
are in its own registers, each row is read once and its SiLU computed once (half as often again for the two columns beside the
strip): computed for every tap, the exponentials alone would take longer than the memory.

A row is a tuple: of the strip's four columns, or of six, with the one to the left and the one to the right.
"""

import triton
import triton.language as tl

from plugins.silu import ASSEMBLY, silu, silu_of_twice, silu_slope, sixteenth_of_silu
from plugins.static_scale import as_output

__all__ = ["add_dots", "four", "gate_kernel", "live_at", "picture_at", "six", "taps", "wide", "wide_row"]


@triton.jit
def picture_at(tensor, picture, height, width, stride):
    """Pointer to a picture. int64: 64 pictures of 32 x 32 tokens pass 2**29 elements; one alone stays below 2**31."""
    return tensor + picture.to(tl.int64) * height * width * stride


@triton.jit
def live_at(column, end, channels_C, live_C):
    """Where live, and the column is from 0 to end - 1."""
    column_C = tl.zeros_like(channels_C) + column  # a scalar condition in a mask is more than Triton's interpreter takes
    return live_C & (column_C >= 0) & (column_C < end)


@triton.jit
def _pixel(strip_C, number: tl.constexpr, stride, column, end, channels_C, live_C):
    """(C,), zero outside the picture. strip_C: pointers to a row's column, from which this one is `number` away."""
    return tl.load(strip_C + number * stride, mask=live_at(column + number, end, channels_C, live_C), other=0.0)


@triton.jit
def _strip(picture, row, column, height, width, stride, channels_C):
    """Pointers to a pixel's channels, and where a row ends. The other pixels' are whole strides away, which where the stride is
    known when the kernel is compiled is a part of the load's instruction."""
    return picture + (row * width + column) * stride + channels_C, tl.where((row >= 0) & (row < height), width, 0)


@triton.jit
def four(picture, row, column, height, width, stride, channels_C, live_C):
    strip_C, end = _strip(picture, row, column, height, width, stride, channels_C)
    p0 = _pixel(strip_C, 0, stride, column, end, channels_C, live_C)
    p1 = _pixel(strip_C, 1, stride, column, end, channels_C, live_C)
    p2 = _pixel(strip_C, 2, stride, column, end, channels_C, live_C)
    p3 = _pixel(strip_C, 3, stride, column, end, channels_C, live_C)
    return p0, p1, p2, p3


@triton.jit
def six(picture, row, column, height, width, stride, channels_C, live_C):
    strip_C, end = _strip(picture, row, column, height, width, stride, channels_C)
    left = _pixel(strip_C, -1, stride, column, end, channels_C, live_C)
    p0, p1, p2, p3 = four(picture, row, column, height, width, stride, channels_C, live_C)
    right = _pixel(strip_C, 4, stride, column, end, channels_C, live_C)
    return left, p0, p1, p2, p3, right


@triton.jit
def wide(x):
    return x.to(tl.float32)


@triton.jit
def wide_row(row):
    return wide(row[0]), wide(row[1]), wide(row[2]), wide(row[3]), wide(row[4]), wide(row[5])


@triton.jit
def silu_row(row, COARSE: tl.constexpr, HALF: tl.constexpr = False):
    w = row if HALF else wide_row(row)
    return silu(w[0], COARSE), silu(w[1], COARSE), silu(w[2], COARSE), silu(w[3], COARSE), silu(w[4], COARSE), silu(w[5], COARSE)


@triton.jit
def taps(weight, row: tl.constexpr, channels, channels_C, live_C):
    """Three taps of a filter's row, (C,) each, fp32. weight (3, 3, channels)."""
    at = weight + 3 * row * channels + channels_C
    left = tl.load(at, mask=live_C, other=0.0).to(tl.float32)
    here = tl.load(at + channels, mask=live_C, other=0.0).to(tl.float32)
    right = tl.load(at + 2 * channels, mask=live_C, other=0.0).to(tl.float32)
    return left, here, right


@triton.jit
def _fma(a, b, c):
    """a b + c. fp16 two at a time: the compiler itself finds only some of the pairs, and packs and unpacks those."""
    if a.dtype == tl.float16 and ASSEMBLY:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.float16, True, 2)
    else:
        return a * b + c


@triton.jit
def _dot(total, taps, left, here, right):
    return _fma(taps[2], right, _fma(taps[1], here, _fma(taps[0], left, total)))


@triton.jit
def add_dots(sums, taps, row):
    """sums, of four columns, + a row of the filter on a row of six."""
    s0 = _dot(sums[0], taps, row[0], row[1], row[2])
    s1 = _dot(sums[1], taps, row[1], row[2], row[3])
    s2 = _dot(sums[2], taps, row[2], row[3], row[4])
    s3 = _dot(sums[3], taps, row[3], row[4], row[5])
    return s0, s1, s2, s3


@triton.jit
def _store_gradients(strip_C, number: tl.constexpr, column, width, inner: tl.constexpr, channels_C, live_C, dy, a, g):
    live = live_at(column + number, width, channels_C, live_C)
    kind = strip_C.dtype.element_ty
    tl.store(strip_C + number * 2 * inner, (dy * silu(g)).to(kind), mask=live)
    tl.store(strip_C + (number * 2 + 1) * inner, (dy * a * silu_slope(g)).to(kind), mask=live)


@triton.jit
def _times(taps, factor):
    return taps[0] * factor, taps[1] * factor, taps[2] * factor


@triton.jit
def _narrow(taps):
    """A sixteenth of them, in fp16."""
    taps = _times(taps, 0.0625)
    return taps[0].to(tl.float16), taps[1].to(tl.float16), taps[2].to(tl.float16)


@triton.jit
def _store_gated(
    strip_C,
    number: tl.constexpr,
    column,
    width,
    inner: tl.constexpr,
    channels_C,
    live_C,
    a,
    g,
    inverse,
    scales,
    COARSE: tl.constexpr,
):
    """inverse: of the scale, or 1. Sums in fp16 are a sixteenth of a and of a half of g."""
    if a.dtype == tl.float16:
        gated = wide(a) * (wide(sixteenth_of_silu(g)) * (256.0 * inverse))
    else:
        gated = a * ((silu_of_twice(g) if COARSE else silu(g)) * inverse)
    tl.store(strip_C + number * inner, as_output(gated, strip_C, scales), mask=live_at(column + number, width, channels_C, live_C))


@triton.jit
def gate_kernel(
    x,
    weight,
    bias,
    dy,
    out,
    out_scales,
    height,
    width,
    rows,
    out_scale,
    inner: tl.constexpr,
    C: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """out: y (B, H, W, E); if BACKWARD, the gradient of the convolution's result (B, H, W, 2E). rows: of a program.

    out_scale: None, or y is in 8 bits; out_scales: None, or it has scales.
    """
    channels_C = tl.program_id(0) * C + tl.arange(0, C)
    live_C = channels_C < inner
    num_strips = tl.cdiv(width, 4)
    column = tl.program_id(1) % num_strips * 4
    first = tl.program_id(1) // num_strips * rows
    picture = tl.program_id(2)
    channels: tl.constexpr = 2 * inner
    x = picture_at(x, picture, height, width, channels)
    gates = x + inner
    if BACKWARD:
        dy = picture_at(dy, picture, height, width, inner)
        out = picture_at(out, picture, height, width, channels)
    else:
        out = picture_at(out, picture, height, width, inner)
    if out_scales is not None:
        if tl.program_id(0) == 0:
            at = column + tl.arange(0, 4)
            scales = picture_at(out_scales, picture, height, width, 1) + at
            for row in range(first, min(first + rows, height)):
                tl.store(scales + row * width, tl.zeros((4,), tl.float32) + out_scale, mask=at < width)

    # COARSE's error is nothing beside the rounding of 8 bits and of bf16, 2**-9. Beside that of fp16, 2**-12, it is not: were it
    # 2**-11 everywhere, y would err 0.6 to 1.15 times as much (rms; the largest error up to 2.2 times) as PyTorch's, which rounds
    # each operator's result, on random numbers and sana-tiny's; on an H200 it is 0.36 to 0.44 times on random numbers. Gradients in
    # fp16 go without: they train nothing here.
    E4M3: tl.constexpr = out_scales is not None or out.dtype.element_ty == tl.float8e4nv
    FP16: tl.constexpr = x.dtype.element_ty == tl.float16
    COARSE: tl.constexpr = x.dtype.element_ty == tl.bfloat16 or (FP16 and not BACKWARD)

    # Nine products in fp16 lose nothing beside e4m3's rounding: the error (rms) of 2880 random channels is 0.07 % more. Two at a
    # time they are two thirds of the instructions: 23.6 us, not 26.8, of 5600 channels. Their sums are a sixteenth of what they are
    # elsewhere, so that they may reach 2**20 where fp16 ends at 2**16, and PyTorch's convolution in fp16 with it.
    HALF: tl.constexpr = E4M3 and FP16 and not BACKWARD

    a0, g0 = taps(weight, 0, channels, channels_C, live_C), taps(weight + inner, 0, channels, channels_C, live_C)
    a1, g1 = taps(weight, 1, channels, channels_C, live_C), taps(weight + inner, 1, channels, channels_C, live_C)
    a2, g2 = taps(weight, 2, channels, channels_C, live_C), taps(weight + inner, 2, channels, channels_C, live_C)
    bias_a = tl.load(bias + channels_C, mask=live_C, other=0.0).to(tl.float32)
    bias_g = tl.load(bias + inner + channels_C, mask=live_C, other=0.0).to(tl.float32)
    inverse = 1.0
    if out_scale is not None:
        # Not tl.div_rn, for whose slow path the loop has 33 registers more, which leave room for fewer programs; two units in the
        # last place are nothing beside steps of 8 bits. And not a factor of the filter: fp16 could not hold its sums.
        inverse = 1.0 / out_scale
    if COARSE and not BACKWARD:  # half of g, as silu_of_twice wants it
        g0, g1, g2, bias_g = _times(g0, 0.5), _times(g1, 0.5), _times(g2, 0.5), bias_g * 0.5
    if HALF:
        a0, a1, a2, bias_a = _narrow(a0), _narrow(a1), _narrow(a2), (bias_a * 0.0625).to(tl.float16)
        g0, g1, g2, bias_g = _narrow(g0), _narrow(g1), _narrow(g2), (bias_g * 0.0625).to(tl.float16)
    start_a, start_g = (bias_a, bias_a, bias_a, bias_a), (bias_g, bias_g, bias_g, bias_g)

    # Of the row of results under way all but the last row of taps is summed up, of the next one the first row of taps.
    row_a = silu_row(six(x, first - 1, column, height, width, channels, channels_C, live_C), COARSE, HALF)
    row_g = silu_row(six(gates, first - 1, column, height, width, channels, channels_C, live_C), COARSE, HALF)
    here_a, here_g = add_dots(start_a, a0, row_a), add_dots(start_g, g0, row_g)
    row_a = silu_row(six(x, first, column, height, width, channels, channels_C, live_C), COARSE, HALF)
    row_g = silu_row(six(gates, first, column, height, width, channels, channels_C, live_C), COARSE, HALF)
    here_a, here_g = add_dots(here_a, a1, row_a), add_dots(here_g, g1, row_g)
    next_a, next_g = add_dots(start_a, a0, row_a), add_dots(start_g, g0, row_g)
    # Loads are a row ahead of their use, so that their latency is hidden: the compiler moves none before a store.
    ahead_a = six(x, first + 1, column, height, width, channels, channels_C, live_C)
    ahead_g = six(gates, first + 1, column, height, width, channels, channels_C, live_C)
    for row in range(first, min(first + rows, height)):
        row_a, row_g = silu_row(ahead_a, COARSE, HALF), silu_row(ahead_g, COARSE, HALF)
        ahead_a = six(x, row + 2, column, height, width, channels, channels_C, live_C)
        ahead_g = six(gates, row + 2, column, height, width, channels, channels_C, live_C)
        a, g = add_dots(here_a, a2, row_a), add_dots(here_g, g2, row_g)
        here_a, here_g = add_dots(next_a, a1, row_a), add_dots(next_g, g1, row_g)
        next_a, next_g = add_dots(start_a, a0, row_a), add_dots(start_g, g0, row_g)
        if BACKWARD:
            d0, d1, d2, d3 = four(dy, row, column, height, width, inner, channels_C, live_C)
            strip_C = out + (row * width + column) * channels + channels_C
            _store_gradients(strip_C, 0, column, width, inner, channels_C, live_C, wide(d0), a[0], g[0])
            _store_gradients(strip_C, 1, column, width, inner, channels_C, live_C, wide(d1), a[1], g[1])
            _store_gradients(strip_C, 2, column, width, inner, channels_C, live_C, wide(d2), a[2], g[2])
            _store_gradients(strip_C, 3, column, width, inner, channels_C, live_C, wide(d3), a[3], g[3])
        else:
            strip_C = out + (row * width + column) * inner + channels_C
            _store_gated(strip_C, 0, column, width, inner, channels_C, live_C, a[0], g[0], inverse, out_scales, COARSE)
            _store_gated(strip_C, 1, column, width, inner, channels_C, live_C, a[1], g[1], inverse, out_scales, COARSE)
            _store_gated(strip_C, 2, column, width, inner, channels_C, live_C, a[2], g[2], inverse, out_scales, COARSE)
            _store_gated(strip_C, 3, column, width, inner, channels_C, live_C, a[3], g[3], inverse, out_scales, COARSE)
