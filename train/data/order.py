"""Which samples make up step n of an epoch, on each of several GPUs.

A step's batch has pictures of one bucket. Every epoch shuffles the samples of each bucket, cuts them into batches and shuffles the
batches: each sample comes once an epoch. All of it follows from seed and epoch, so that a position is two numbers, epoch and step,
and a resumed run goes on with the same samples. The batch of a step is the same for every number of GPUs; each takes its share.
The last batch of a bucket is short. All GPUs still take the same steps; where a short batch has fewer samples than there are GPUs,
some get none: `Batch.whole` is what a mean over the batch divides by. `drop_short` leaves short batches out instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train.data.errors import DataError

__all__ = ["Batch", "Order"]


@dataclass(frozen=True, slots=True)
class Batch:
    """samples: indices into the data set, this GPU's share. whole: how many samples all GPUs have together."""

    epoch: int
    step: int  # of the epoch
    bucket: int
    samples: tuple[int, ...]
    whole: int


class Order:
    """buckets: of each sample. batch_size: samples a step, of all GPUs together. rank of world: this GPU among all."""

    def __init__(
        self,
        buckets: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_short: bool = False,
    ) -> None:
        if not 0 <= rank < world or batch_size < 1:
            raise DataError(f"got rank {rank} of {world} and batches of {batch_size}; expected 0 <= rank < world and 1 or more.")
        self._buckets = np.asarray(buckets, dtype=np.int64)
        self._batch_size, self._seed, self._rank, self._world, self._drop_short = batch_size, seed, rank, world, drop_short
        counts = np.bincount(self._buckets) if len(self._buckets) else np.zeros(0, dtype=np.int64)
        rounded = counts // batch_size if drop_short else -(-counts // batch_size)
        self.steps_per_epoch = int(rounded.sum())
        if not self.steps_per_epoch:
            raise DataError(
                f"got {len(self._buckets)} samples and not one batch of {batch_size} of one bucket; expected one or more. "
                "Use smaller batches, or keep short ones."
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. Raises DataError if the epoch has no such step."""
        if not 0 <= start <= self.steps_per_epoch:
            raise DataError(
                f"step: got {start} of an epoch of {self.steps_per_epoch}; expected a position in it. "
                "Was the position saved with other data or another batch size?"
            )
        rng = np.random.Generator(np.random.Philox([self._seed, epoch]))
        batches: list[tuple[int, np.ndarray]] = []
        for bucket in np.unique(self._buckets):
            members = rng.permutation(np.flatnonzero(self._buckets == bucket))
            for begin in range(0, len(members), self._batch_size):
                batch = members[begin : begin + self._batch_size]
                if len(batch) == self._batch_size or not self._drop_short:
                    batches.append((int(bucket), batch))
        for step, which in enumerate(rng.permutation(len(batches))[start:], start):
            bucket, batch = batches[which]
            yield Batch(epoch, step, bucket, tuple(map(int, batch[self._rank :: self._world])), len(batch))

    def endless(self, epoch: int = 0, step: int = 0) -> Iterator[Batch]:
        """From a position on, epoch after epoch. The position after `batch` is (batch.epoch, batch.step + 1)."""
        while True:
            yield from self.epoch(epoch, step)
            epoch, step = epoch + 1, 0
