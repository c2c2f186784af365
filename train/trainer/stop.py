"""Ending a run in good order: SIGTERM and Ctrl-C ask for it, and the loop saves and returns."""

from __future__ import annotations

import signal

__all__ = ["Stop"]


class Stop:
    """Set by SIGTERM and SIGINT once installed."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
