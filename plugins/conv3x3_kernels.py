"""The Triton kernels of plugins/conv3x3.py, whose docstring says what they compute, and names dimensions.

Their parts are those of its variants too, in conv3x3_quantized.py and conv3x3_upsample.py.
"""

import triton
import triton.language as tl

from plugins.silu import silu

__all__ = ["activated", "block_of", "conv_kernel", "convolved", "norm_kernel", "outputs_at", "row_of"]


@triton.jit
def _taps_within(pixel_M, height, width):
    """A bit a tap, set where the tap lies in the picture, also of pixels past its end, whose rows are read and thrown away.

    Made before the sum, whose loop is a quarter longer if every step compares (233 instead of 183 instructions, SM 90).
    """
    row_M, column_M = pixel_M // width, pixel_M % width
    taps_M = tl.zeros_like(pixel_M)
    for tap in tl.static_range(9):
        row_there_M, column_there_M = row_M + (tap // 3 - 1), column_M + (tap % 3 - 1)
        within_M = (row_there_M >= 0) & (row_there_M < height) & (column_there_M >= 0) & (column_there_M < width)
        taps_M |= within_M.to(tl.int32) << tap
    return taps_M


@triton.jit
def convolved(
    sums_MN,
    x,
    weight,
    picture,
    start,
    n_N,
    height,
    width,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CORNERS: tl.constexpr = False,
    corner=0,
):
    """sums_MN plus (M, N), fp32, of INT8 int32: from pixel `start` of a picture, counted along its rows, and channels out; zero
    past the end.

    CORNERS: of the nine taps only the four around `corner` (0 to 3, along rows) count; the weights of others are zero.
    """
    m_M, k_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    taps_M = _taps_within(start + m_M, height, width)
    # int64: a picture of 4096 px alone has 2**31 elements at 128 channels. From there on 32 bits do: a tap is a row or so away.
    x += (picture.to(tl.int64) * height * width + start) * C
    x_MK = m_M[:, None] * C + k_K[None, :]
    # Of 8 bits, weights are read (N, K) and turned. Read (K, N), Triton 3.9 carries their fragments from step to step in a register
    # for each byte, on SM 80 to 89: a loop of 515 instructions, 208 of them spills, where this one has 123 (INT8, SM 86).
    turned: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth == 8
    if turned:
        n_KN, k_KN = n_N[:, None], k_K[None, :]
    else:
        n_KN, k_KN = n_N[None, :], k_K[:, None]
    weight_KN = n_KN * (9 * C) + k_KN
    num_blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K  # of a tap
    num_taps: tl.constexpr = 4 if CORNERS else 9
    for step in range(num_taps * num_blocks):  # one loop, so that loads run ahead from tap to tap
        tap, first = step // num_blocks, step % num_blocks * BLOCK_K
        if CORNERS:
            tap = (corner // 2 + tap // 2) * 3 + corner % 2 + tap % 2
        down, right = tap // 3 - 1, tap % 3 - 1
        live_MK = ((taps_M >> tap) & 1 != 0)[:, None]
        weight_at_KN = weight + (tap * C + first) + weight_KN
        if C % BLOCK_K:
            live_MK &= (first + k_K < C)[None, :]
        moved = x + ((down * width + right) * C + first)  # the rest of the address is the same in every step
        pixels_MK = tl.load(moved + x_MK, mask=live_MK, other=0.0)
        if C % BLOCK_K or N % BLOCK_N:
            w_KN = tl.load(weight_at_KN, mask=(first + k_KN < C) & (n_KN < N), other=0.0)
        else:
            w_KN = tl.load(weight_at_KN)
        if turned:
            w_KN = tl.trans(w_KN)
        # ieee: for fp32 inputs; the default, TF32, has 10 bits of mantissa. Half precision products are exact in fp32 anyway.
        # out_dtype: where it is not given, Triton before 3.8 refuses sums that are not fp32, int32 too.
        sums_MN = tl.dot(pixels_MK, w_KN, sums_MN, input_precision="ieee", out_dtype=sums_MN.dtype)
    return sums_MN


@triton.jit
def row_of(vector, n_N, N: tl.constexpr):
    """(1, N) of a vector of N, fp32, zero past its end."""
    return tl.load(vector + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def block_of(pixels, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first of a program's pixels, and of its channels."""
    num_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * num_blocks) * GROUP_M
    in_group, group_size = tl.program_id(0) % (GROUP_M * num_blocks), min(tl.cdiv(pixels, BLOCK_M) - group, GROUP_M)
    return (group + in_group % group_size) * BLOCK_M, in_group // group_size * BLOCK_N


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, COARSE: tl.constexpr):
    """COARSE: as plugins/silu.py has it, where bf16 rounds what comes of it, or 8 bits have rounded x."""
    if ACTIVATION == "silu":
        x = silu(x, COARSE)
    elif ACTIVATION == "relu":
        # A NaN must come out as NaN, as from torch.relu; plain maximum would turn it into 0.
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def outputs_at(picture, start, n_N, height, width, N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where in (B, h, w, N) a program begins, how far from there its (M, N) are, and which of them are in the picture."""
    m_M = tl.arange(0, BLOCK_M)
    live_MN = (start + m_M < height * width)[:, None] & (n_N < N)[None, :]
    return (picture.to(tl.int64) * height * width + start) * N, m_M[:, None] * N + n_N[None, :], live_MN


@triton.jit
def conv_kernel(
    x,
    weight,
    bias,
    y,
    height,
    width,
    C: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program: M pixels of a picture, N channels."""
    picture = tl.program_id(1)
    start, first_channel = block_of(height * width, N, BLOCK_M, BLOCK_N, GROUP_M)
    n_N = first_channel + tl.arange(0, BLOCK_N)
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums_MN = convolved(sums_MN, x, weight, picture, start, n_N, height, width, C, N, BLOCK_M, BLOCK_N, BLOCK_K)
    sums_MN = activated(sums_MN + row_of(bias, n_N, N), ACTIVATION, y.dtype.element_ty == tl.bfloat16)
    first, at_MN, live_MN = outputs_at(picture, start, n_N, height, width, N, BLOCK_M)
    tl.store(y + first + at_MN, sums_MN.to(y.dtype.element_ty), mask=live_MN)


@triton.jit
def norm_kernel(
    x,
    weight,
    residual,
    norm_weight,
    norm_bias,
    y,
    height,
    width,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: M pixels of a picture, all channels."""
    picture = tl.program_id(1)
    start = tl.program_id(0) * BLOCK_M
    n_N = tl.arange(0, BLOCK_N)
    conv_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    conv_MN = convolved(conv_MN, x, weight, picture, start, n_N, height, width, C, N, BLOCK_M, BLOCK_N, BLOCK_K)
    scale_M = tl.rsqrt(tl.sum(conv_MN * conv_MN, axis=1) / N + eps)  # past the end of the channels the sums are zero
    normed_MN = conv_MN * scale_M[:, None] * row_of(norm_weight, n_N, N) + row_of(norm_bias, n_N, N)
    first, at_MN, live_MN = outputs_at(picture, start, n_N, height, width, N, BLOCK_M)
    residual_MN = tl.load(residual + first + at_MN, mask=live_MN, other=0.0).to(tl.float32)
    tl.store(y + first + at_MN, (residual_MN + normed_MN).to(y.dtype.element_ty), mask=live_MN)
