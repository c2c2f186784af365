"""Where in a run a micro-batch is: what everything random in it is a function of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Place"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """seed: the run's. step: how many are done. micro_batch: within the step. rank: of the process."""

    seed: int
    step: int
    micro_batch: int = 0
    rank: int = 0

    def hashed(self, what: str = "") -> int:
        """A seed of 63 bits for this place, another one for each `what`. A hash, because neighbouring seeds and sums of counters
        would collide."""
        text = f"{what or 'objective'} {self.seed} {self.step} {self.micro_batch} {self.rank}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
