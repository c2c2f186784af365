"""Taking times: stopwatches, and rounds in which what is judged and what it is judged by take turns.

A machine that is busy, hot or throttled slows both, so a ratio of neighbours in time says more than milliseconds do. In each round
every yardstick runs once and then the task; after the last round the yardsticks run once more. A task's ratio is its time over the
mean of the yardstick's before and after it. The device's times are compared, or, where a yardstick's work is a whole program's, the
wall clock's.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engines.errors import RequestError
from runtime.cuda import Marks

__all__ = [
    "Call",
    "Percentiles",
    "Rounds",
    "Sample",
    "Stopwatch",
    "StreamMarks",
    "Task",
    "TorchEvents",
    "calls_for",
    "cpu_clock",
    "interleave",
    "peak_memory",
    "percentiles",
    "reset_peak_memory",
]

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    ms: float  # of the device: between CUDA events; on a CPU, of its cores, summed over threads
    wall_ms: float  # from the call to the moment when all of its work is done


class Stopwatch(Protocol):
    """Times a call, all work that it queues included."""

    def __call__(self, call: Call) -> Sample: ...


def cpu_clock(call: Call) -> Sample:
    """The processor's time of all of this process's threads, to which other programs add nothing; and the wall clock's."""
    began, wall_began = time.process_time(), time.perf_counter()
    call()
    return Sample(1000 * (time.process_time() - began), 1000 * (time.perf_counter() - wall_began))


class TorchEvents:
    """CUDA events on PyTorch's current stream."""

    def __call__(self, call: Call) -> Sample:
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end), 1000 * (time.perf_counter() - began))


class StreamMarks:
    """CUDA events on the runtime's stream. cuda: a runtime.cuda.Cuda."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def __call__(self, call: Call) -> Sample:
        self._cuda.make_current()
        self._cuda.synchronize()
        with Marks(self._cuda) as marks:
            began = time.perf_counter()
            marks.add()
            call()
            marks.add()
            self._cuda.synchronize()
            wall_ms = 1000 * (time.perf_counter() - began)
            return Sample(1000 * marks.seconds()[0], wall_ms)


@dataclass(frozen=True)
class Task:
    """Something that can be called again and again. calls: how many of them one sample averages. by_wall: as a yardstick it is
    compared by the wall clock. note: what is to be said of its samples, once they are taken."""

    name: str
    call: Call
    stopwatch: Stopwatch
    calls: int = 1
    by_wall: bool = False
    note: Callable[[], str] = str

    def sample(self) -> Sample:
        """Milliseconds a call."""

        def repeated() -> None:
            for _ in range(self.calls):
                self.call()

        found = self.stopwatch(self.call if self.calls == 1 else repeated)
        return Sample(found.ms / self.calls, found.wall_ms / self.calls)


def calls_for(task: Task, least_ms: float, most: int = 100) -> int:
    """How many calls make a sample of `least_ms`, at most `most`. Calls the task twice: the first is warm-up."""
    task.sample()
    return max(1, min(most, math.ceil(least_ms / max(task.sample().wall_ms, 1e-6))))


@dataclass(frozen=True)
class Rounds:
    """What interleave() measured. n rounds."""

    samples: tuple[Sample, ...]  # n, of the task
    references: Mapping[str, tuple[float, ...]]  # yardstick's name: n + 1 milliseconds of the device, or by the wall clock
    by_wall: frozenset[str] = frozenset()  # names of the latter
    notes: Mapping[str, str] = field(default_factory=dict)  # yardstick's name: what it says of its samples

    def ratios(self, name: str) -> tuple[float, ...]:
        """n: the task's time over the mean of its two neighbours', of the same clock."""
        neighbours = (sum(pair) / 2 for pair in pairwise(self.references[name]))
        mine = (sample.wall_ms if name in self.by_wall else sample.ms for sample in self.samples)
        return tuple(ms / near for ms, near in zip(mine, neighbours, strict=True))


def interleave(task: Task, references: Sequence[Task], *, rounds: int, warm_up: int) -> Rounds:
    """Measure by turns. Raises RequestError for fewer than 3 rounds, from which no spread can be told.

    A GPU at its limit of power has a higher clock behind work that leaves it idle, such as an eager peer's. In a fixed order the
    next peer would always have that place, and the task never. So each reference in turn is the first of a round, with the others
    behind it as they are or, from one such cycle to the next, in reverse.
    """
    if rounds < 3:
        raise RequestError(f"rounds: got {rounds}; expected at least 3, and 30 or more for a comparison.")
    names = [reference.name for reference in references]
    if len({*names, task.name}) != len(names) + 1:
        raise RequestError(f"references: got {', '.join([task.name, *names])}; expected a name each.")
    for _ in range(warm_up):
        for each in (*references, task):
            each.sample()
    samples: list[Sample] = []
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for reference in _turn(references, number):
            found = reference.sample()
            times[reference.name].append(found.wall_ms if reference.by_wall else found.ms)
        if number < rounds:
            samples.append(task.sample())
    by_wall = frozenset(reference.name for reference in references if reference.by_wall)
    notes = {reference.name: reference.note() for reference in references}
    return Rounds(tuple(samples), {name: tuple(values) for name, values in times.items()}, by_wall, notes)


def _turn(references: Sequence[Task], number: int) -> list[Task]:
    """Those of a round."""
    cycle, first = divmod(number, max(1, len(references)))
    order = references if cycle % 2 == 0 else references[::-1]
    return [*order[first:], *order[:first]]


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float


def percentiles(values: Sequence[float]) -> Percentiles:
    p50, p90, p99 = (float(value) for value in np.percentile(np.asarray(values, np.float64), [50, 90, 99]))
    return Percentiles(p50, p90, p99)


def reset_peak_memory() -> None:
    """Have peak_memory() count from now, where the kernel lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # then the peak is the process's since its start


def peak_memory() -> int:
    """The most bytes of this process that were resident at once."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
