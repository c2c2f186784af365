"""The decision between slower and noise, on planted runs: rounds whose noise is like a busy machine's, from a fixed seed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.latency_check import Limits, compare
from benchmarks.latency_timing import Rounds, Sample
from engines.errors import RequestError

WORK_MS, GEMM_MS = 80.0, 7.0


def planted(seed: int, *, slower: float = 1.0, machine: float = 1.0, rounds: int = 60, noise: float = 0.02) -> Rounds:
    """A run. machine: how much slower everything is. Noise: a slow drift that both share (4 %), `noise` of each sample's own, and
    one sample in twenty that takes up to twice as long because something else ran."""
    rng = np.random.default_rng(seed)
    drift = machine * np.exp(0.04 * np.cumsum(rng.standard_normal(2 * rounds + 1)) / np.sqrt(rounds))

    def sample(mean: float, at: np.ndarray) -> np.ndarray:
        own = np.exp(noise * rng.standard_normal(len(at)))
        interrupted = np.where(rng.random(len(at)) < 0.05, 1 + rng.random(len(at)), 1)
        return mean * at * own * interrupted

    work, gemm = sample(WORK_MS * slower, drift[1::2]), sample(GEMM_MS, drift[::2])
    return Rounds(tuple(Sample(ms, ms) for ms in work), {"gemm": tuple(gemm)})


def is_slower(now: Rounds, then: Rounds, **limits: float) -> bool:
    yardstick = float(np.median(now.references["gemm"]))
    return compare(now.ratios("gemm"), then.ratios("gemm"), yardstick_ms=yardstick, limits=Limits(**limits)).regression


SEEDS = range(40)


def test_five_percent_are_caught() -> None:
    caught = [is_slower(planted(seed, slower=1.05), planted(1000 + seed)) for seed in SEEDS]
    assert sum(caught) >= 0.95 * len(caught)


def test_noise_is_let_by() -> None:
    assert not any(is_slower(planted(seed), planted(1000 + seed)) for seed in SEEDS)


def test_a_machine_that_is_slower_or_noisier_today_is_no_regression() -> None:
    assert not any(is_slower(planted(seed, machine=1.4, noise=0.04), planted(1000 + seed)) for seed in SEEDS)


def test_five_percent_are_caught_on_a_faster_machine() -> None:
    """Milliseconds fell, the ratio did not."""
    now, then = planted(1, slower=1.05, machine=0.7), planted(2)
    assert np.median([sample.ms for sample in now.samples]) < np.median([sample.ms for sample in then.samples])
    assert is_slower(now, then)


def test_both_limits_must_be_passed() -> None:
    now, then = planted(1, slower=1.05), planted(2)
    assert not is_slower(now, then, percent=7.0)
    assert not is_slower(now, then, floor_ms=8.0)
    assert is_slower(now, then, floor_ms=2.0)


def test_what_is_faster_is_no_regression() -> None:
    assert not is_slower(planted(1, slower=0.9), planted(2))


def test_a_change_that_chance_explains_is_let_by() -> None:
    """Medians are 10 % apart, and the spread is larger."""
    verdict = compare([1.0, 1.1, 1.3], [0.8, 1.0, 1.2], yardstick_ms=10, limits=Limits())
    assert verdict.change == pytest.approx(0.1)
    assert verdict.low < 0
    assert not verdict.regression


def test_the_verdict_is_reproducible_and_in_words() -> None:
    now, then = planted(1, slower=1.05).ratios("gemm"), planted(2).ratios("gemm")
    first, second = (compare(now, then, yardstick_ms=7, limits=Limits()) for _ in range(2))
    assert first == second
    assert first.low < first.change < first.high
    assert str(compare([1.05] * 5, [1.0] * 5, yardstick_ms=10, limits=Limits())) == "+5.0% (+5.0% to +5.0%), +0.500 ms"


@pytest.mark.parametrize("bad", [[], [1.0, 1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0]])
def test_what_is_no_measurement_is_refused(bad: list[float]) -> None:
    with pytest.raises(RequestError, match=r"then: got .* expected 3 or more positive ratios"):
        compare([1.0] * 3, bad, yardstick_ms=1, limits=Limits())
