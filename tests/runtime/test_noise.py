"""The noise is what docs/noise.md says: known answers, a second implementation in scalar Python, and the statistics of a normal."""

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import RequestError
from runtime.noise import MAX_SEED, check_seed, normal, normal_batch, philox4x32

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())

KNOWN_ANSWERS = [  # Random123's kat_vectors, "philox4x32 10"
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox4x32(np.array(words(counter), np.uint32), words(key)).tolist() == words(expected)
    many = philox4x32(np.array([words(counter)] * 3, np.uint32), words(key))
    assert many.tolist() == [words(expected)] * 3


# --- the specification once more, one element at a time, in Python's own integers and floats (which never fuse) ---


def scalar_philox(c: list[int], k: list[int]) -> list[int]:
    mask = 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def horner(z: float, coefficients: list[Fraction]) -> float:
    total = float(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * z + float(coefficient)
    return total


def scalar_normal(seed: int, i: int, stream: int) -> float:
    block, place = divmod(i, 4)
    r = scalar_philox([block & 0xFFFFFFFF, block >> 32, stream, 0], [seed & 0xFFFFFFFF, seed >> 32])
    p, q = r[place // 2 * 2], r[place // 2 * 2 + 1]
    m, e = math.frexp((2 * p + 1) * 2.0**-33)
    if m < 0.7071067811865476:
        m, e = m * 2, e - 1
    s = (m - 1) / (m + 1)
    z = s * s
    ln_u = e * 0.6931471805599453 + s * (2 + z * horner(z, [Fraction(2, 2 * k + 1) for k in range(1, 11)]))
    t = ((q + 2**29) >> 30) & 3
    a = ((q - (t << 30) + 2**31) % 2**32 - 2**31) * 1.4629180792671596e-09
    z = a * a
    sin = a + a * (z * horner(z, [Fraction((-1) ** k, math.factorial(2 * k + 1)) for k in range(1, 9)]))
    cos = 1 + z * horner(z, [Fraction((-1) ** k, math.factorial(2 * k)) for k in range(1, 9)])
    turned = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)][t]
    return float(np.float32(math.sqrt(-2 * ln_u) * turned[place % 2]))


@given(seed=st.integers(0, MAX_SEED), i=st.integers(0, 104), stream=st.integers(0, 2**32 - 1))
def test_bit_equal_to_the_scalar_form(seed: int, i: int, stream: int) -> None:
    got = normal(seed, (3, 5, 7), stream).reshape(-1)[i]
    assert got.tobytes() == np.float32(scalar_normal(seed, i, stream)).tobytes()


def test_close_to_exact_box_muller() -> None:
    """Against the platform's log, sin and cos: the polynomials are not merely reproducible."""
    count = 40_000
    counter = np.zeros((count // 4, 4), np.uint32)
    counter[:, 0] = np.arange(count // 4)
    r = philox4x32(counter, (7, 0)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((2 * r[:, 0::2] + 1) / 2**33)), r[:, 1::2] * (2 * math.pi / 2**32)
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)
    got = normal(7, (1, 1, count)).reshape(-1)
    assert np.all(np.abs(got - exact) <= np.spacing(np.abs(got)) * 0.5 + 1e-14)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['seed']}-{case['stream']}")
def test_golden(case: dict) -> None:
    values = normal(int(case["seed"]), tuple(case["shape"]), case["stream"]).astype("<f4")
    assert [f"{word:08x}" for word in values.reshape(-1)[:8].view("<u4")] == case["first_bits"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == case["sha256"]


def test_statistics_of_a_normal() -> None:
    x = np.sort(np.concatenate([normal(seed, (32, 32, 32)).reshape(-1) for seed in range(8)]).astype(np.float64))
    n = x.size  # 262,144; bounds are five standard errors
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    distance = max(np.max(np.arange(1, n + 1) / n - cdf), np.max(cdf - np.arange(n) / n))
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %


def test_neighbours_and_streams_are_uncorrelated() -> None:
    a = normal(3, (32, 32, 32)).reshape(-1).astype(np.float64)
    for b in (np.roll(a, 1), np.roll(a, 2), normal(3, (32, 32, 32), 1).reshape(-1), normal(4, (32, 32, 32)).reshape(-1)):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size)


def test_independent_of_the_batch() -> None:
    alone = normal(5, (4, 3, 3), 2)
    batch = normal_batch([9, 5, 2**40], (4, 3, 3), 2)
    assert batch.shape == (3, 4, 3, 3)
    assert batch.dtype == np.float32
    assert batch[1].tobytes() == alone.tobytes()


def test_longer_array_begins_with_the_shorter() -> None:
    assert normal(1, (1, 1, 1000)).reshape(-1)[:63].tobytes() == normal(1, (1, 1, 63)).tobytes()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", None, True, float("nan")])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(RequestError, match=r"expected an integer from 0 to 18446744073709551615"):
        normal(seed, (1, 1, 1))  # type: ignore[arg-type]


def test_numpy_integers_are_seeds() -> None:
    assert check_seed(np.uint64(MAX_SEED)) == MAX_SEED


@pytest.mark.parametrize(("shape", "stream"), [((1, 1), 0), ((0, 1, 1), 0), ((1, 1, 1), -1), ((1, 1, 1), 2**32)])
def test_bad_shape_or_stream(shape: tuple, stream: int) -> None:
    with pytest.raises(RequestError, match="noise"):
        normal(0, shape, stream)
