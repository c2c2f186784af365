"""Broken samples: each is counted, and the run stops when they are more than a set share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from train.data.errors import TooManyBroken

__all__ = ["MAX_NAMED", "Broken", "Report"]

MAX_NAMED = 10_000  # in the file; all are counted
SHOWN = 5  # in a message


@dataclass(frozen=True, slots=True)
class Broken:
    """A sample, or a whole file, that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Report:
    """total: samples of the data set, broken ones included. max_share: of them that may be broken."""

    def __init__(self, *, total: int, max_share: float, broken: Iterable[Broken] = ()) -> None:
        self.total, self.max_share = total, max_share
        self.broken: list[Broken] = list(broken)

    def add(self, broken: Broken) -> None:
        """Count and name it. Raises TooManyBroken as soon as the share of the whole data set is passed."""
        self.broken.append(broken)
        self.check()

    def check(self) -> None:
        """Raises TooManyBroken."""
        if len(self.broken) > self.max_share * self.total:
            shown = "".join(f"\n  {broken}" for broken in self.broken[:SHOWN])
            more = f"\n  and {len(self.broken) - SHOWN} more" if len(self.broken) > SHOWN else ""
            raise TooManyBroken(
                f"got {len(self.broken)} broken of {self.total} samples; expected at most {self.max_share:.2%} of them "
                f"(max_broken_share). Mend or remove these, or allow more:{shown}{more}"
            )

    def to_json(self) -> bytes:
        """The file report.json: the same bytes for the same samples, in whatever order they were found."""
        named = sorted(self.broken, key=lambda broken: (broken.name, broken.reason))
        content: dict[str, Any] = {
            "samples": self.total,
            "broken": len(named),
            "not_named": max(0, len(named) - MAX_NAMED),
            "named": [asdict(broken) for broken in named[:MAX_NAMED]],
        }
        return (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode()
