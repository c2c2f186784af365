"""A finished cache as the trainer takes it: micro-batches without end, of one GPU's share, read ahead, from any position on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from train.data.errors import DataError
from train.data.order import Batch, Order
from train.data.reading import Cache

__all__ = ["CachedSource"]

AHEAD = 2  # batches, at least


class CachedSource:
    """length: L, to which text is padded. temperature: of the choice of captions. rank of world: this GPU among all.

    num_workers: threads that read ahead; 0: each batch is read when it is asked for. The batches and their order are the same.
    With a GPU they are in pinned memory, so that copying does not wait.
    A position is how many batches all GPUs together have taken, so that a run may go on with another number of GPUs.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        micro_batch: int,
        length: int,
        seed: int,
        temperature: float,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 1,
    ) -> None:
        if num_workers < 0:
            raise DataError(f"num_workers: got {num_workers}; expected 0 or more threads.")
        self._cache, self._length, self._seed, self._temperature = cache, length, seed, temperature
        self._micro_batch, self._rank, self._world = micro_batch, rank, world
        self._order = Order(cache.buckets, batch_size=micro_batch, seed=seed)
        self._position, self._num_workers, self._pin = 0, num_workers, torch.cuda.is_available()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """latents (B, C, h, w), times the scaling factor; prompt_embeds (B, L, C) and prompt_mask (B, L) fp32, 1 for text."""
        for tensors in self._ahead() if self._num_workers else map(self._read, self._batches()):
            self._position += self._world
            yield tensors

    def _batches(self) -> Iterator[Batch]:
        return self._order.batches(self._position, rank=self._rank, world=self._world)

    def _ahead(self) -> Iterator[dict[str, Tensor]]:
        waiting: deque[Future[dict[str, Tensor]]] = deque()
        ahead = max(AHEAD, self._num_workers)
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="data") as pool:
            for batch in self._batches():
                waiting.append(pool.submit(self._read, batch))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": self._position,
            "micro_batch": self._micro_batch,
            "seed": self._seed,
            "cache": self._cache.identity.digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError if the position is one of other data, or of batches of another size."""
        mine = self.state_dict()
        wrong = [name for name in mine if name != "batches" and state.get(name) != mine[name]]
        if wrong or not isinstance(state.get("batches"), int) or state["batches"] < 0:
            raise DataError(
                f"data: got a position of {dict(state)}; expected one of {mine}: {', '.join(wrong) or 'batches'} differs. "
                "Go on with the settings and the cache that the run began with, or begin a new run."
            )
        self._position = state["batches"]

    def _read(self, batch: Batch) -> dict[str, Tensor]:
        read = self._cache.batch(
            batch.samples,
            length=self._length,
            passes=batch.passes,
            seed=self._seed,
            temperature=self._temperature,
            pin=self._pin,
        )
        return {"latents": read.latents, "prompt_embeds": read.text, "prompt_mask": read.mask}
