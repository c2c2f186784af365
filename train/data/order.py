"""Which samples make up batch n of a run, for any number of GPUs.

A batch has pictures of one bucket. Each bucket's samples are shuffled anew for every pass and put end to end, pass after pass;
batches are cut from that line, and those that end within an epoch are shuffled. So every sample comes once a pass, every batch is
full, and what is left of a bucket at the end of an epoch belongs to the next. (In a bucket with fewer samples than a batch, a batch
spans several passes.) Short or dropped batches would be the alternatives: over 33 buckets, a small data set would lose much of
itself each epoch.

The line of batches follows from the seed alone, so that a position in it is one number, and a run on more GPUs, which take batches
in turn, sees the same ones: at any moment GPUs may have different buckets, whose areas are about the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train.data.errors import DataError

__all__ = ["Batch", "Order"]


@dataclass(frozen=True, slots=True)
class Batch:
    """samples: indices into the data set. passes: of each of them, how often the run saw it before."""

    number: int  # of the run
    bucket: int
    samples: tuple[int, ...]
    passes: tuple[int, ...]


class Order:
    """buckets: of each sample. batch_size: samples in a batch, all of them on one GPU."""

    def __init__(self, buckets: Sequence[int], *, batch_size: int, seed: int) -> None:
        if not len(buckets) or batch_size < 1:
            raise DataError(f"got {len(buckets)} samples and batches of {batch_size}; expected 1 or more of both.")
        all_buckets = np.asarray(buckets, dtype=np.int64)
        self._members = {int(bucket): np.flatnonzero(all_buckets == bucket) for bucket in np.unique(all_buckets)}
        self._batch_size, self._seed = batch_size, seed

    def num_before(self, epoch: int) -> int:
        """How many batches come before an epoch."""
        return sum(epoch * len(members) // self._batch_size for members in self._members.values())

    def epoch_of(self, number: int) -> int:
        """The epoch of batch `number`."""
        last = 1
        while self.num_before(last) <= number:
            last *= 2
        first = last // 2
        while first + 1 < last:  # num_before(first) <= number < num_before(last)
            middle = (first + last) // 2
            first, last = (middle, last) if self.num_before(middle) <= number else (first, middle)
        return first

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches that end in an epoch, without the first `skip`; none, if the data set is smaller than a batch."""
        size = self._batch_size
        cut: list[tuple[int, int]] = []  # bucket, and number of the batch within its line
        for bucket, members in self._members.items():
            cut += [(bucket, index) for index in range(epoch * len(members) // size, (epoch + 1) * len(members) // size)]
        shuffled = self._rng(epoch).permutation(len(cut))
        lines: dict[tuple[int, int], np.ndarray] = {}
        for number in range(skip, len(cut)):
            bucket, index = cut[shuffled[number]]
            members = self._members[bucket]
            places = [divmod(place, len(members)) for place in range(index * size, (index + 1) * size)]
            for passed in {passed for passed, _ in places}:
                if (bucket, passed) not in lines:
                    lines[bucket, passed] = self._rng(passed, bucket).permutation(members)
            samples = tuple(int(lines[bucket, passed][place]) for passed, place in places)
            yield Batch(self.num_before(epoch) + number, bucket, samples, tuple(passed for passed, _ in places))

    def batches(self, start: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Without end: from batch number `start` on, those that GPU `rank` of `world` takes. Raises DataError."""
        if start < 0 or not 0 <= rank < world:
            raise DataError(
                f"got batch {start} and rank {rank} of {world}; expected 0 or more, and a rank below the number of GPUs."
            )
        epoch = self.epoch_of(start)
        later = itertools.chain.from_iterable(self.epoch(number) for number in itertools.count(epoch + 1))
        line = itertools.chain(self.epoch(epoch, start - self.num_before(epoch)), later)
        return itertools.islice(line, rank, None, world)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox([self._seed, *what]))
