"""Whole loops as CUDA graphs: one launch a picture instead of hundreds a step, so that the GPU never waits for Python.

A graph holds addresses and shapes, so its key names all of them. CUDA refuses a graph that copies memory which was freed, even if
other memory has the address since: all are forgotten when memory is freed. A picture of a size that was not drawn lately is drawn
launch by launch, which also lets engines settle on the shape; the next one of that size is captured, and launched from then on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from runtime.cuda import Cuda, Marks

__all__ = ["Loop", "Loops"]


class Loop:
    """One graph, and the marks in it."""

    def __init__(self, cuda: Cuda, queue: Callable[[Marks], None]) -> None:
        """queue: puts all work on the stream. It is captured, not run."""
        self._cuda, self.marks = cuda, Marks(cuda, captured=True)
        try:
            self._graph = cuda.capture(lambda: queue(self.marks))
        except BaseException:
            self.marks.close()
            raise

    def launch(self) -> None:
        self._cuda.launch_graph(self._graph)

    def close(self) -> None:
        self._cuda.destroy_graph(self._graph)
        self.marks.close()


class Loops:
    """The loops of the latest keys."""

    def __init__(self, cuda: Cuda, *, limit: int = 8) -> None:
        """limit: how many keys are remembered. A graph of 20 steps of Sana-1.6B has some thousand nodes."""
        self._cuda, self._limit, self._num_freed = cuda, limit, cuda.num_freed
        self._kept: OrderedDict[Hashable, Loop | None] = OrderedDict()

    def get(self, key: Hashable, queue: Callable[[Marks], None]) -> Loop | None:
        """The loop of `key`, captured if the key is known and has none yet; None if the key is new: queue the work as it is.

        All are forgotten where memory was freed since the last time. None may be running.
        """
        if self._num_freed != self._cuda.num_freed:
            self.clear()
            self._num_freed = self._cuda.num_freed
        if key not in self._kept:
            self._kept[key] = None
            if len(self._kept) > self._limit:
                _, oldest = self._kept.popitem(last=False)
                _close(oldest)
            return None
        self._kept.move_to_end(key)
        if self._kept[key] is None:
            self._kept[key] = Loop(self._cuda, queue)
        return self._kept[key]

    def clear(self) -> None:
        """None may be running."""
        while self._kept:  # each is let go before it is closed: after Ctrl-C none is closed twice
            _close(self._kept.popitem()[1])


def _close(loop: Any) -> None:
    if loop is not None:
        loop.close()
