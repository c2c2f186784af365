"""Batches out of a table that lies on the device: which rows a batch has is a function of seed and number alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from train.trainer.errors import TrainingError

__all__ = ["TableSource", "batch_generator"]


def batch_generator(seed: int, number: int) -> torch.Generator:
    """On the CPU, for one batch."""
    digest = hashlib.sha256(f"table {seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class TableSource:
    """A source as the trainer takes it. make: a batch, from its generator. What it is made of must be the same when a run goes on;
    `what` names it (a digest or the settings), and a position in another table is refused."""

    def __init__(self, make: Callable[[torch.Generator], Mapping[str, Tensor]], *, seed: int, what: str) -> None:
        self._make, self._seed, self._what, self._number = make, seed, what, 0

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        while True:
            batch = self._make(batch_generator(self._seed, self._number))
            self._number += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._number, "what": self._what}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("what") != self._what:
            raise TrainingError(
                f"data: got a position in {state.get('what')!r}; expected one in {self._what!r}. Begin another run."
            )
        self._number = int(state["batches"])
