"""Sizes that pictures are brought to, so that a batch has one size while aspect ratios stay close to the pictures' own.

The sizes of 512 px walk the height from 256 to 1024 px in steps of 32, the autoencoder's cell, with the width that comes closest
to an area of 512² px; each also stands on its side. Those of 1024, 2048 and 4096 px are the same, times 2, 4 and 8, as in Sana's
tables: every resolution has the same aspect ratios, and the number of buckets, over which batches are spread, stays at 33.
Source of the scheme: Sana, arXiv:2410.10629, which trains on aspect ratios from 0.25 to 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.data.errors import DataError

__all__ = ["MAX_ASPECT", "RESOLUTIONS", "Bucket", "crop_box", "make_buckets", "nearest"]

BASE = 512  # px, the resolution whose sizes are multiples of CELL
CELL = 32  # px, side of a latent cell
MAX_ASPECT = 4.0
RESOLUTIONS = (512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size in px."""

    width: int
    height: int

    @property
    def log_aspect(self) -> float:
        return math.log(self.height) - math.log(self.width)  # a difference: exactly negated when the sides are swapped

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@functools.cache
def make_buckets(resolution: int) -> tuple[Bucket, ...]:
    """The sizes of a resolution, from wide to tall. Raises DataError."""
    if resolution not in RESOLUTIONS:
        raise DataError(f"resolution: got {resolution}; expected one of {', '.join(map(str, RESOLUTIONS))}.")
    scale = resolution // BASE
    sizes = set()
    for height in range(BASE // 2, 2 * BASE + 1, CELL):
        width = CELL * round(BASE * BASE / height / CELL)
        if max(width / height, height / width) <= MAX_ASPECT:
            sizes |= {Bucket(width * scale, height * scale), Bucket(height * scale, width * scale)}
    return tuple(sorted(sizes, key=lambda size: (size.log_aspect, size)))


def nearest(buckets: Sequence[Bucket], width: int, height: int) -> int:
    """Index of the bucket whose aspect ratio is nearest, as a factor: 1:2 is as far from 1:1 as 2:1 is.

    Between two that are as near, the squarer, then the larger one: a picture on its side lands in the bucket on its side.
    """
    aspect = math.log(height) - math.log(width)

    def distance(index: int) -> tuple[float, float, int]:
        bucket = buckets[index]
        return abs(bucket.log_aspect - aspect), abs(bucket.log_aspect), -bucket.width * bucket.height

    return min(range(len(buckets)), key=distance)


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The centre of a picture that has the bucket's aspect ratio and touches two of its sides: left, top, right, bottom in px."""
    wide, high = float(width), float(height)
    if width * bucket.height > height * bucket.width:
        wide = height * bucket.width / bucket.height
    else:
        high = width * bucket.height / bucket.width
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high
