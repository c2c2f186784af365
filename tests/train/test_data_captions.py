"""Which caption an epoch sees."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.captions import choose, probabilities
from train.data.errors import DataError

scores = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8)
temperatures = st.floats(0, 1e6)


@given(scores, temperatures)
def test_probabilities(values, temperature):
    shares = probabilities(values, temperature)
    assert math.fsum(shares) == pytest.approx(1)
    for score, share in zip(values, shares, strict=True):
        for other, its in zip(values, shares, strict=True):
            if score > other and temperature > 0:
                assert share >= its


def test_they_are_exponential_in_the_score():
    first, second, third = probabilities([28.0, 27.0, 25.0], 0.5)
    assert first / second == pytest.approx(math.e**2)
    assert second / third == pytest.approx(math.e**4)
    assert probabilities([7, 7], 0.1) == [0.5, 0.5]


def test_no_temperature_takes_the_best_and_of_equals_the_first():
    assert probabilities([1.0, 3.0, 3.0, 2.0], 0) == [0, 1, 0, 0]
    assert probabilities([1e9, -1e9], 5e-324) == [1, 0]  # the smallest positive number: no overflow


@given(scores, temperatures, st.integers(0, 2**63 - 1), st.integers(0, 1000), st.text(st.characters()))
def test_the_choice_is_a_function_of_its_arguments(values, temperature, seed, epoch, key):
    got = choose(values, temperature, seed=seed, epoch=epoch, key=key)
    assert got == choose(list(values), temperature, seed=seed, epoch=epoch, key=key)
    assert probabilities(values, temperature)[got] > 0


def test_frequencies_follow_the_probabilities():
    values, num = [2.0, 1.0, 0.0], 6000
    counts = Counter(choose(values, 1.0, seed=5, epoch=i // 100, key=f"{i % 100}") for i in range(num))
    for index, share in enumerate(probabilities(values, 1.0)):
        deviation = math.sqrt(num * share * (1 - share))
        assert abs(counts[index] - num * share) < 4 * deviation
    drawn = [choose([1.0, 1.0], 1.0, seed=0, epoch=epoch, key="a") for epoch in range(20)]
    assert set(drawn) == {0, 1}  # another epoch, another caption


@pytest.mark.parametrize(
    ("values", "temperature", "words"),
    [
        ([], 1, "expected one finite number"),
        ([math.nan], 1, "finite"),
        ([1.0], -1, "expected 0 or more"),
        ([1.0], math.nan, "got nan"),
    ],
)
def test_bad_arguments(values, temperature, words):
    with pytest.raises(DataError, match=words):
        probabilities(values, temperature)
