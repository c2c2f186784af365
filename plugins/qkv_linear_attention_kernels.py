"""The two Triton kernels of plugins/qkv_linear_attention.py, whose docstring says what they compute, and names dimensions.

A head's D channels are PADDED, a power of two, in registers. rotary: None, or cosines and sines of each token's angles, by which
pairs of channels, (2 e, 2 e + 1), of relu(q) and relu(k) are turned where they meet S (Sana-Video; diffusers'
transformer_sana_video.py, SanaLinearAttnProcessor3_0).
"""

import triton
import triton.language as tl

from plugins.silu import ASSEMBLY
from plugins.static_scale import as_output

__all__ = ["apply_kernel", "state_kernel"]


@triton.jit
def _relu(x):
    # A NaN must come out as NaN, as from torch.relu; plain maximum would turn it into 0.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _as_tf32(wide):
    """To nearest, where a tensor core cuts off. Not of a NaN, whose bits may become a number's."""
    rounded = ((wide.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(wide == wide, rounded, wide)


@triton.jit
def _halves(wide):
    """Two numbers in bf16 whose sum is one in fp32 but for 2**-17 of it."""
    high = wide.to(tl.bfloat16)
    return high, (wide - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_product(x, y, total):
    """x and y in bf16, whose bits Triton's interpreter, which has no ASSEMBLY, would multiply."""
    if ASSEMBLY:
        return tl.dot(x, y, total)
    else:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _dot(exact, wide, PRECISION: tl.constexpr):
    """exact @ wide in fp32. exact: numbers that the inputs' dtype holds, or of fp32, which are split too; wide: fp32."""
    if PRECISION == "split" and exact.dtype == tl.float32:
        exact_high, exact_low = _halves(exact)
        high, low = _halves(wide)
        nothing = tl.zeros((exact.shape[0], wide.shape[1]), tl.float32)
        return _add_product(exact_high, high, _add_product(exact_high, low, _add_product(exact_low, high, nothing)))
    elif PRECISION == "split":
        high, low = _halves(wide)
        return tl.dot(exact.to(tl.bfloat16), high, tl.dot(exact.to(tl.bfloat16), low))
    elif PRECISION == "tf32":
        return tl.dot(exact.to(tl.float32), _as_tf32(wide), input_precision="tf32")
    else:
        return tl.dot(exact.to(tl.float32), wide, input_precision=PRECISION)


@triton.jit
def _channel(number: tl.constexpr, head, heads, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where in a row the head's q (0), k (1) or v (2) starts."""
    if INTERLEAVED:
        return (3 * head + number) * D
    else:
        return (number * heads + head) * D


@triton.jit
def _live(n, end, d, D: tl.constexpr):
    """(N, channels): tokens before `end` and, where channels are more than D, those of a head."""
    if d.shape[0] == D:
        return n[:, None] < end
    else:
        return (n[:, None] < end) & (d[None, :] < D)


@triton.jit
def _rotated(x_ND, rotary, n, n_tokens, D: tl.constexpr):
    """x in fp32, each pair of channels turned by its token's angle. rotary (2, N, D / 2)."""
    even_NE, odd_NE = tl.split(tl.reshape(x_ND.to(tl.float32), (x_ND.shape[0], x_ND.shape[1] // 2, 2)))
    e = tl.arange(0, x_ND.shape[1] // 2)
    at_NE, live_NE = rotary + n.to(tl.int64)[:, None] * (D // 2) + e[None, :], _live(n, n_tokens, e, D // 2)
    cos_NE = tl.load(at_NE, mask=live_NE, other=0.0)
    sin_NE = tl.load(at_NE + n_tokens * (D // 2), mask=live_NE, other=0.0)
    turned = tl.join(even_NE * cos_NE - odd_NE * sin_NE, even_NE * sin_NE + odd_NE * cos_NE)
    return tl.reshape(turned, (x_ND.shape[0], x_ND.shape[1]))


@triton.jit
def state_kernel(
    qkv,
    rotary,
    state,
    heads,
    n_tokens,
    n_part,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program: one head of an image, n_part tokens. rotary: None, or cosines and sines (2, N, D / 2)."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row = 3 * heads * D
    d = tl.arange(0, PADDED)
    first_D = qkv + image.to(tl.int64) * n_tokens * row + d  # int64: 64 images of 4096 px pass 2**31 elements
    k_D, v_D = first_D + _channel(1, head, heads, D, INTERLEAVED), first_D + _channel(2, head, heads, D, INTERLEAVED)
    first = tl.program_id(1) * n_part
    state_DD, z_D = tl.zeros((PADDED, PADDED), tl.float32), tl.zeros((PADDED,), tl.float32)
    for start in range(first, min(first + n_part, n_tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at, live = n.to(tl.int64)[:, None] * row, _live(n, n_tokens, d, D)
        k_ND = _relu(tl.load(k_D[None, :] + at, mask=live, other=0.0)).to(qkv.dtype.element_ty)
        v_ND = tl.load(v_D[None, :] + at, mask=live, other=0.0)
        # ieee: for fp32 inputs; the default, TF32, has 10 bits of mantissa. Half precision products are exact in fp32 anyway.
        if rotary is None:
            state_DD = tl.dot(tl.trans(k_ND), v_ND, state_DD, input_precision="ieee")
        else:
            turned_ND = _rotated(k_ND, rotary, n, n_tokens, D)
            if PRECISION == "ieee":
                state_DD = tl.dot(tl.trans(turned_ND), v_ND, state_DD, input_precision="ieee")
            else:  # its roundings, of as many as there are tokens, cancel each other
                state_DD = tl.dot(tl.trans(_as_tf32(turned_ND)), v_ND.to(tl.float32), state_DD, input_precision="tf32")
        z_D += tl.sum(k_ND.to(tl.float32), axis=0)
    part = state + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (D + 1) * D
    if PADDED == D:
        tl.store(part + d[:, None] * D + d[None, :], state_DD)
        tl.store(part + D * D + d, z_D)
    else:
        tl.store(part + d[:, None] * D + d[None, :], state_DD, mask=_live(d, D, d, D))
        tl.store(part + D * D + d, z_D, mask=d < D)


@triton.jit
def _tile(q_D, row, start, end, d, D: tl.constexpr, BLOCK_N: tl.constexpr):
    n = start + tl.arange(0, BLOCK_N)
    return tl.load(q_D[None, :] + n.to(tl.int64)[:, None] * row, mask=_live(n, end, d, D), other=0.0)


@triton.jit
def apply_kernel(
    qkv,
    rotary,
    state,
    out,
    out_scales,
    heads,
    n_tokens,
    n_tile,
    parts,
    eps,
    out_scale,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program: one head of an image, n_tile tokens. out_scale: None, or out is in 8 bits; out_scales: None, or it has scales.

    rotary: as state_kernel's."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    d = tl.arange(0, PADDED)
    tokens, row = image.to(tl.int64) * n_tokens, 3 * heads * D
    q_D = qkv + tokens * row + _channel(0, head, heads, D, INTERLEAVED) + d
    out_D = out + tokens * heads * D + head * D + d
    first = tl.program_id(1) * n_tile
    # Tokens are loaded ahead: the first before the parts, each next while these are computed.
    next_ND = _tile(q_D, row, first, n_tokens, d, D, BLOCK_N)
    state_DD, z_D = tl.zeros((PADDED, PADDED), tl.float32), tl.zeros((PADDED,), tl.float32)
    for number in range(parts):
        part = state + (tl.program_id(0).to(tl.int64) * parts + number) * (D + 1) * D
        if PADDED == D:
            state_DD += tl.load(part + d[:, None] * D + d[None, :])
            z_D += tl.load(part + D * D + d)
        else:
            state_DD += tl.load(part + d[:, None] * D + d[None, :], mask=_live(d, D, d, D), other=0.0)
            z_D += tl.load(part + D * D + d, mask=d < D, other=0.0)
    if out_scales is not None:  # a loop of its own: in the next one it takes ten registers
        if head == 0:
            for start in range(first, min(first + n_tile, n_tokens), BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                tl.store(out_scales + tokens + n, tl.zeros((BLOCK_N,), tl.float32) + out_scale, mask=n < n_tokens)
    for start in range(first, min(first + n_tile, n_tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q_ND = _relu(next_ND)
        next_ND = _tile(q_D, row, start + BLOCK_N, min(first + n_tile, n_tokens), d, D, BLOCK_N)
        if rotary is None:
            top_ND = _dot(q_ND, state_DD, PRECISION)
        else:
            top_ND = _dot(_rotated(q_ND, rotary, n, n_tokens, D), state_DD, PRECISION)
        bottom_N = tl.sum(q_ND.to(tl.float32) * z_D[None, :], axis=1) + eps
        if out_scale is None:
            # One division a token, not one a channel: exact division is a call of some thirty instructions.
            out_ND = top_ND * tl.div_rn(1.0, bottom_N)[:, None]
        else:
            out_ND = top_ND * (1.0 / (bottom_N * out_scale))[:, None]
        tl.store(
            out_D[None, :] + n.to(tl.int64)[:, None] * (heads * D),
            as_output(out_ND, out, out_scales),
            mask=_live(n, n_tokens, d, D),
        )
