"""A bar on stderr for work that lasts: quiet when stderr is no terminal, and during the first second."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["StepBar"]

PATIENCE_S = 1.0


class StepBar:
    """`with StepBar(total) as bar: ... bar.advance()`. shown: None means if stderr is a terminal."""

    def __init__(self, total: int, *, shown: bool | None = None) -> None:
        self._total, self._done = total, 0
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._forced = True if shown else None  # who asks for a bar gets it, also in a pipe
        self._lock = threading.Lock()  # the timer's thread starts the bar
        self._bar: tuple[Progress, TaskID] | None = None
        self._timer = threading.Timer(PATIENCE_S, self._start)
        self._timer.daemon = True

    def __enter__(self) -> StepBar:
        if self._shown:
            self._timer.start()
        return self

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            if self._bar is not None:
                self._bar[0].update(self._bar[1], completed=self._done)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
        progress = Progress(*columns, console=Console(stderr=True, force_terminal=self._forced), transient=True)
        with self._lock:
            if self._shown:
                self._bar = (progress, progress.add_task("drawing", total=self._total, completed=self._done))
                progress.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            self._shown = False  # a timer that fires now finds the work done
            if self._bar is not None:
                self._bar[0].stop()
