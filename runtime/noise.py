"""Noise that is the same on every machine: Philox 4x32-10 counters through Box-Muller, specified to the last bit.

A seed must give the same latents in Python, in C++ and in the reference, whatever the batch, the device or the library version. So
nothing here calls a libm function whose last bit differs between platforms: logarithm, sine and cosine are polynomials on reduced
ranges, made of IEEE 754 float64 additions, multiplications and divisions, each rounded once (no fused multiply-add), and `sqrt`,
which IEEE 754 rounds correctly. `docs/noise.md` is the specification; this file follows it line by line.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox); Box and Muller, 1958.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.errors import RequestError

__all__ = ["MAX_SEED", "check_seed", "normal", "normal_batch", "philox4x32"]

U32 = NDArray[np.uint32]
F64 = NDArray[np.float64]

MAX_SEED = 2**64 - 1  # the key is two 32-bit words
MAX_STREAM = 2**32 - 1  # one word of the counter

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key: golden ratio, sqrt(3) - 1
_ROUNDS = 10
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)

_LN_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_RADIANS = 1.4629180792671596e-09  # of a turn in 2**32: pi / 2**31
# Coefficients are the correctly rounded doubles of these fractions. Each list is in ascending powers.
_LOG = tuple(2.0 / (2 * k + 1) for k in range(1, 11))  # 2 atanh(s) = s (2 + z LOG(z)), z = s s <= 0.0295: truncated by < 7e-19
_SIN = (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000, 1 / 355687428096000)  # < 9e-20
_COS = (-1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200, 1 / 20922789888000)  # < 3e-18


def philox4x32(counter: U32, key: Sequence[int] | U32) -> U32:
    """Ten rounds of Philox 4x32.

    counter: (N, 4) uint32, or (4,). key: two 32-bit words. Returns four random words for each counter, in the counter's shape.
    """
    c0, c1, c2, c3 = np.array(np.asarray(counter, np.uint32).T, np.uint64, order="C")  # each in one piece of memory, and ours
    k0, k1 = (int(k) for k in key)
    for _ in range(_ROUNDS):
        c0 *= _MULTIPLIERS[0]  # 32 x 32 bits fit in 64
        c2 *= _MULTIPLIERS[1]
        c1 ^= (c2 >> _WORD) ^ np.uint64(k0)
        c3 ^= (c0 >> _WORD) ^ np.uint64(k1)
        c0, c1, c2, c3 = c1, c2 & _LOW, c3, c0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _horner(z: F64, ascending: Sequence[float]) -> F64:
    total = np.full_like(z, ascending[-1])
    for coefficient in reversed(ascending[:-1]):
        total *= z  # in place: half of the time goes into new arrays
        total += coefficient  # NumPy rounds the product and the sum apart
    return total


def _log(u: F64) -> F64:
    """ln(u) for u in (0, 1), of at most 33 significant bits. Relative error below 1e-15."""
    mantissa, exponent = np.frexp(u)  # exact; mantissa in [0.5, 1)
    small = mantissa < _SQRT_HALF
    mantissa *= 1.0 + small  # 1 or 2, exact; now in [sqrt(1/2), sqrt(2))
    exponent -= small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    return exponent * _LN_2 + s * (2.0 + z * _horner(z, _LOG))


def _cos_sin(turn: U32) -> tuple[F64, F64]:
    """Cosine and sine of turn / 2**32 of a full turn. Absolute error below 2e-16."""
    quadrant = (turn + np.uint32(1 << 29)) >> np.uint32(30)  # the nearest multiple of a quarter turn; four of them wrap to 0
    rest = (turn - (quadrant << np.uint32(30))).view(np.int32)  # -2**29 to 2**29 - 1
    a = rest * _RADIANS  # at most pi / 4 either way
    z = a * a
    sin, cos = a + a * (z * _horner(z, _SIN)), 1.0 + z * _horner(z, _COS)
    turned = (quadrant & 1) == 1
    cos, sin = np.where(turned, sin, cos), np.where(turned, cos, sin)
    cos *= 1.0 - 2.0 * ((quadrant == 1) | (quadrant == 2))  # 1 or -1, exact; flips the sign of zero too
    sin *= 1.0 - 2.0 * (quadrant >= 2)
    return cos, sin


def check_seed(seed: object) -> int:
    """`seed` as an int from 0 to 2**64 - 1. Raises RequestError for anything else, booleans and floats included."""
    try:
        value = operator.index(seed) if not isinstance(seed, bool) else None  # type: ignore[arg-type]
    except TypeError:
        value = None
    if value is None or not 0 <= value <= MAX_SEED:
        raise RequestError(f"seed: got {seed!r}; expected an integer from 0 to {MAX_SEED} (2**64 - 1).")
    return value


def normal(seed: int, shape: tuple[int, int, int], stream: int = 0) -> NDArray[np.float32]:
    """Standard normal noise for one image.

    seed: 0 to 2**64 - 1, the Philox key. shape: (C, h, w), channels and latent cells. stream: 0 is the initial noise, i + 1 the
    fresh noise of step i. Returns float32 (C, h, w); element i, counted in C order, depends on seed, stream and i alone. The
    largest magnitude that can occur is 6.77. Raises RequestError for a seed, shape or stream out of range.
    """
    seed = check_seed(seed)
    if len(shape) != 3 or min(shape) < 1:
        raise RequestError(f"noise shape: got {shape}; expected (channels, height, width), each at least 1.")
    if not 0 <= stream <= MAX_STREAM:
        raise RequestError(f"noise stream: got {stream}; expected 0 (initial noise) to {MAX_STREAM} (step + 1).")
    count = int(np.prod(shape, dtype=np.int64))
    block = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = np.zeros((block.size, 4), np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = block & _LOW, block >> _WORD, stream
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    u = (words[:, 0::2].astype(np.float64) * 2.0 + 1.0) * 2.0**-33  # (N, 2); exact; an even and an odd word make two numbers
    radius = np.sqrt(-2.0 * _log(u))
    cos, sin = _cos_sin(np.ascontiguousarray(words[:, 1::2]))
    values = np.stack([radius * cos, radius * sin], axis=-1).astype(np.float32)
    return values.reshape(-1)[:count].reshape(shape)


def normal_batch(seeds: Sequence[int], shape: tuple[int, int, int], stream: int = 0) -> NDArray[np.float32]:
    """Noise for a batch, (B, C, h, w): image b is `normal(seeds[b], shape, stream)`, so it does not depend on its neighbours."""
    return np.stack([normal(seed, shape, stream) for seed in seeds])
