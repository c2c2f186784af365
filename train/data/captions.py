"""Which of a picture's captions an epoch trains on.

A caption with score s is drawn with probability proportional to exp(s / temperature), so that better ones come more often and the
others still come: Sana, arXiv:2410.10629, on captions of several vision-language models with CLIP scores. Temperature 0 takes
the best one. The draw depends on seed, epoch and the sample's key alone: a resumed run, and one on more GPUs, sees the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.data.errors import DataError

__all__ = ["Caption", "choose", "probabilities"]


@dataclass(frozen=True, slots=True)
class Caption:
    """score: how well it fits its picture, such as 100 x CLIP similarity; 0 for all captions of a picture that come without."""

    text: str
    score: float = 0.0


def probabilities(scores: Sequence[float], temperature: float) -> list[float]:
    """Of each caption; they sum to 1. Temperature 0: the best one, the first of several. Raises DataError."""
    if not scores or not all(math.isfinite(score) for score in scores):
        raise DataError(f"scores: got {list(scores)}; expected one finite number or more.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise DataError(f"caption_temperature: got {temperature}; expected 0 or more.")
    best = max(scores)
    weights = [_weight(score - best, temperature) for score in scores]
    if temperature == 0:
        first = scores.index(best)
        weights = [float(index == first) for index in range(len(scores))]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _weight(below_best: float, temperature: float) -> float:
    """exp(below_best / temperature); the quotient may overflow to -inf, which is right."""
    return 1.0 if below_best == 0 else math.exp(below_best / temperature) if temperature > 0 else 0.0


def choose(scores: Sequence[float], temperature: float, *, seed: int, epoch: int, key: str) -> int:
    """Index of the caption that `epoch` sees of the sample `key`."""
    shares = probabilities(scores, temperature)
    drawn = (
        int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{key}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
    )  # 0 <= drawn <= 1
    for index, share in enumerate(shares):
        drawn -= share
        if drawn < 0:
            return index
    return max(range(len(shares)), key=shares.__getitem__)  # rounding left a rest above the last share
