"""How the commands show things: tables, and a bar for bytes. rich is loaded when something is shown."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

__all__ = ["ByteBar", "add_row", "make_console", "make_table", "printable"]

PATIENCE_S = 1.0  # what ends sooner needs no bar
PLAIN_WIDTH = 160  # columns where there is no terminal to ask


def make_console() -> Console:
    """On stdout. In a file or a pipe: no colours, no boxes that wrap at 80 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def make_table(title: str, *columns: str, numbers_from: int | None = None) -> Table:
    """numbers_from: the first column whose cells are numbers, aligned right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        is_number = numbers_from is not None and number >= numbers_from
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Cells as they are: what looks like rich's markup in them is text."""
    from rich.text import Text

    table.add_row(*(Text(printable(cell)) for cell in cells))


def printable(text: str) -> str:
    """`text` with control characters spelled out, so that a bundle's or a picture's words cannot steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


class ByteBar:
    """`with ByteBar("verifying") as bar: work(progress=bar)`: called with bytes done and bytes in all.

    On stderr, if that is a terminal, after a second.
    """

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> ByteBar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if not sys.stderr.isatty() or time.monotonic() - self._began < PATIENCE_S:
                return
            self._bar = self._start(total)
        progress, task = self._bar
        progress.update(task, completed=done)

    def _start(self, total: int) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.start()
        return progress, progress.add_task(self._what, total=total)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar[0].stop()
