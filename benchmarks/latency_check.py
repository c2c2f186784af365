"""Is this run slower than the accepted one? A decision that lets noise by.

What is compared is the median of paired ratios (latency_timing.py), never milliseconds, so that a machine that is slower today is
no regression. A change counts only if both hold:
- it is beyond `percent`, and chance does not explain that: the lower end of its 90 % bootstrap interval is beyond it. Whole
  stretches of rounds are drawn, not single ones (a moving-block bootstrap), because neighbours in time are slow together. Where the
  machine is so busy that the interval is wide, only a larger change can be told from noise.
- it is beyond `floor_ms`, in milliseconds of today's machine: 5 % of ten microseconds helps nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.errors import RequestError

__all__ = ["Limits", "Verdict", "compare"]

RESAMPLES = 2000
TAIL = 5  # percent, on either side of the interval


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a regression must exceed, both of them."""

    percent: float = 2.0  # by the lower end of the interval
    floor_ms: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Verdict:
    change: float  # of the ratio, as a share: 0.05 is 5 % slower
    low: float  # the interval's ends
    high: float
    change_ms: float  # the same on today's machine
    regression: bool

    def __str__(self) -> str:
        return f"{self.change:+.1%} ({self.low:+.1%} to {self.high:+.1%}), {self.change_ms:+.3f} ms"


def compare(now: Sequence[float], then: Sequence[float], *, yardstick_ms: float, limits: Limits, seed: int = 0) -> Verdict:
    """now, then: paired ratios of the two runs, in the order in which they were measured. yardstick_ms: its median today.

    The same input gives the same verdict. Raises RequestError for a run of fewer than 3 rounds, or a ratio that is not positive.
    """
    for name, values in (("now", now), ("then", then)):
        if len(values) < 3 or not all(math.isfinite(value) and value > 0 for value in values):
            raise RequestError(f"{name}: got {list(values)[:5]}…; expected 3 or more positive ratios. Measure again.")
    median_now, median_then = float(np.median(now)), float(np.median(then))
    rng = np.random.default_rng(seed)
    changes = _resampled_medians(np.asarray(now), rng) / _resampled_medians(np.asarray(then), rng) - 1
    low, high = (float(value) for value in np.percentile(changes, [TAIL, 100 - TAIL]))
    change = median_now / median_then - 1
    change_ms = (median_now - median_then) * yardstick_ms
    beyond = low > limits.percent / 100 and change_ms > limits.floor_ms
    return Verdict(change=change, low=low, high=high, change_ms=change_ms, regression=beyond)


def _resampled_medians(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(RESAMPLES,): each the median of blocks of about sqrt(n) neighbours, drawn with replacement and wrapped around the end."""
    size = len(values)
    block = max(1, round(math.sqrt(size)))
    starts = rng.integers(0, size, (RESAMPLES, -(-size // block)))
    places = (starts[:, :, None] + np.arange(block)) % size
    return np.median(values[places.reshape(RESAMPLES, -1)[:, :size]], axis=1)
