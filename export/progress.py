"""What a build tells while it runs: each stage, its time and its peak memory. Live on a terminal, else a line a stage."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

__all__ = ["Pace", "Progress", "Stage", "peak_memory_bytes", "reset_peak_memory"]

_WORTH_SAYING = 60.0  # seconds left
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> bool:
    """Start a new measurement of this process's peak memory. False where the system has none: the peak is then the process's."""
    try:
        _CLEAR_REFS.write_text("5")  # Linux: sets VmHWM to what is resident now
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """Most memory that was resident at once since the last reset, files mapped into it included."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in KiB, but on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Stage:
    """One finished or running stage. `cached` is set when an earlier run's result served."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0
    cached: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """A fact for the stage's line: a size, a count."""
        self.notes.append(text)

    def line(self) -> str:
        work = "unchanged, nothing done" if self.cached else f"{self.seconds:7.1f} s  peak {self.peak_bytes / 1e9:5.2f} GB"
        return f"{self.name:<40}{work}{'  ' if self.notes else ''}{', '.join(self.notes)}"


class Progress:
    """Runs stages and prints them. `stages` keeps what was measured."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.stages: list[Stage] = []

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time the block and take its peak memory; print its line when it ends. An error passes through, named."""
        stage = Stage(name)
        reset_peak_memory()
        begin = time.perf_counter()
        try:
            if self.console.is_terminal:
                with self.console.status(f"{name} …"):
                    yield stage
            else:
                yield stage
        except BaseException:
            self.say(f"{name:<40}failed after {time.perf_counter() - begin:.1f} s")
            raise
        stage.seconds = time.perf_counter() - begin
        stage.peak_bytes = peak_memory_bytes()
        self.stages.append(stage)
        self.say(stage.line())

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Of the stage that needed most."""
        return max((stage.peak_bytes for stage in self.stages), default=0)

    def report(self) -> list[dict[str, object]]:
        """What was measured, for programs."""
        return [
            {"stage": stage.name, "seconds": stage.seconds, "peak_bytes": stage.peak_bytes, "cached": stage.cached}
            for stage in self.stages
        ]


class Pace:
    """Says once how long the rest of a stage will take, when its first piece of work is done and the rest takes over a minute."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what, self._said = progress, what, False

    @contextmanager
    def piece(self, left: int) -> Iterator[None]:
        """left: pieces after this one, at most: some may be in the cache."""
        begin = time.perf_counter()
        yield
        each = time.perf_counter() - begin
        if not self._said and each * left > _WORTH_SAYING:
            self.progress.say(f"  {self.what}: {each:.0f} s each, about {each * left / 60:.0f} min for the {left} that are left")
        self._said = True
