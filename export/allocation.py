"""Which format each group gets: a multiple-choice knapsack of bytes against error.

The errors of groups are taken to add up, which small independent ones do to first order; what is chosen is measured as a whole
afterwards. All allocations that no other one beats in both bytes and error are found group by group (dynamic programming over the
Pareto front), so that one pass serves every budget. The front is exact up to MAX_FRONT states and thinned beyond; each state is an
allocation that exists, so a budget is never overrun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sana_ref.quantization import Format

__all__ = ["MAX_FRONT", "Choice", "Front", "pareto_front"]

MAX_FRONT = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """num_bytes: of the group in this format. error: of the final latents with this group alone in it; 0 for none."""

    format: Format
    num_bytes: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Front:
    """States by rising bytes and falling error. num_bytes: int64 (n,). error: float64 (n,)."""

    num_bytes: NDArray[np.int64]
    error: NDArray[np.float64]
    _choices: Mapping[str, Sequence[Choice]]
    _back: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]  # of each group: the state before, and the choice

    def __len__(self) -> int:
        return len(self.num_bytes)

    def allocation(self, state: int) -> dict[str, Choice]:
        """The choice of every group."""
        found: dict[str, Choice] = {}
        for (group, choices), (before, chosen) in zip(reversed(list(self._choices.items())), reversed(self._back), strict=True):
            found[group] = choices[int(chosen[state])]
            state = int(before[state])
        return dict(reversed(found.items()))

    def least_error(self, max_bytes: float) -> int | None:
        """The state of least error within `max_bytes`; None if even the smallest is larger."""
        fitting = int(np.searchsorted(self.num_bytes, max_bytes, side="right"))
        return fitting - 1 if fitting else None

    def least_bytes(self, max_error: float) -> int | None:
        """The smallest state whose errors add up to `max_error` at most; None if there is none."""
        fitting = np.flatnonzero(self.error <= max_error)
        return int(fitting[0]) if len(fitting) else None


def pareto_front(choices: Mapping[str, Sequence[Choice]]) -> Front:
    """choices: of every group, one or more. Raises ValueError for a group without, and for errors that are no numbers."""
    num_bytes, error = np.zeros(1, np.int64), np.zeros(1)
    back = []
    for group, offered in choices.items():
        errors = np.array([choice.error for choice in offered])
        if not len(offered) or not (np.isfinite(errors).all() and (errors >= 0).all()):
            raise ValueError(f"{group}: got the errors {errors.tolist()}; expected one or more finite numbers from 0")
        sizes = np.array([choice.num_bytes for choice in offered], np.int64)
        new_bytes = (num_bytes[:, None] + sizes).ravel()
        new_error = (error[:, None] + errors).ravel()
        order = np.lexsort((new_error, new_bytes))
        falling = new_error[order]
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(falling)[:-1]])
        kept = order[falling < best_before]
        if len(kept) > MAX_FRONT:  # evenly over the front, both ends included
            kept = kept[np.unique(np.linspace(0, len(kept) - 1, MAX_FRONT).round().astype(np.int64))]
        before, chosen = np.divmod(kept, len(offered))
        num_bytes, error = new_bytes[kept], new_error[kept]
        back.append((before, chosen))
    return Front(num_bytes=num_bytes, error=error, _choices=dict(choices), _back=back)
