"""The loop that every stage shares: budgets, learning rate, log lines, checkpoints, a polite end on SIGTERM.

A stage gives one function a picture size ("bucket"); each call is one whole training step. On a GPU the functions are captured
as CUDA graphs: the models are small, so launching kernels one by one would take longer than running them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.tiny.flat import FlatParameters
from train.trainer.stop import Stop

CHUNK_SECONDS = 0.3  # how long work is queued ahead of the GPU before the clock is looked at
WARM_UP_CALLS = 3  # eager steps before a capture: they let cuDNN choose and Triton compile. They train like any other


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate by progress (0 to 1): linear warm-up over `warm_up_steps`, constant, then down to 0 over the last `decay`
    of the budget. The constant part means that a budget may be shortened or extended until the decay begins.
    """

    peak: float
    warm_up_steps: int = 200
    decay: float = 0.3

    def at(self, progress: float, step: int) -> float:
        falling = min(1.0, max(0.0, (1.0 - progress) / self.decay))
        return self.peak * min(1.0, (step + 1) / self.warm_up_steps) * falling


@dataclass(kw_only=True)
class Budget:
    """How long a stage may train: in seconds (of training, over all invocations) or in steps (exactly repeatable)."""

    seconds: float = float("inf")
    steps: int | None = None
    used: float = 0.0  # seconds so far

    def progress(self, step: int) -> float:
        return min(1.0, step / self.steps if self.steps is not None else self.used / self.seconds)

    def done(self, step: int) -> bool:
        return self.progress(step) >= 1.0


@dataclass(kw_only=True)
class Log:
    """Prints lines with the time since the start, and keeps them for the metrics file."""

    start: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f}s] {text}"
        self.lines.append(line)
        print(line, flush=True)


def capture(step: Callable[[], None], log: Log, name: str) -> Callable[[], None]:
    """The step as a CUDA graph; as it is without a GPU. Raises RuntimeError if the step does what a graph cannot hold."""
    if not torch.cuda.is_available():
        return step
    began = time.monotonic()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()  # with memory of its own: a pool must not outlive the graphs that share it
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: got {str(error).splitlines()[0]!r}; expected a step that can be captured. Run with --no-graphs"
        ) from error
    log(f"{name}: captured in {time.monotonic() - began:.1f} s, {torch.cuda.memory_reserved() / 2**30:.1f} GiB reserved")
    return graph.replay


@dataclass(kw_only=True)
class Trainer:
    """One stage's training.

    `steps` and `weights` (how often it is chosen) are by bucket name. `stats` is on the device, and the steps add to it: sum of
    losses, of gradient norms, number of steps, then one sum for each of `extra_names`; shown as means and zeroed at each log line.
    """

    name: str
    flat: FlatParameters
    steps: Mapping[str, Callable[[], None]]
    weights: Mapping[str, float]
    schedule: Schedule
    budget: Budget
    log: Log
    stop: Stop
    stats: Tensor
    batch: int
    checkpoint: Path
    extra_names: tuple[str, ...] = ()
    checkpoint_seconds: float = 60.0
    log_seconds: float = 10.0
    seed: int = 0
    step: int = 0
    on_checkpoint: Callable[[], None] | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss) at each log line

    def save(self) -> None:
        """Write the checkpoint through a temporary name, so that a kill leaves the old one whole."""
        state: dict[str, Any] = {
            "flat": self.flat.snapshot(),
            "step": self.step,
            "used": self.budget.used,
            "rng": torch.get_rng_state(),
            "stats": self.stats.cpu(),
        }
        if torch.cuda.is_available():
            state["cuda_rng"] = torch.cuda.get_rng_state()
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one: weights, averages, moments, counts, random numbers."""
        if not self.checkpoint.is_file():
            return False
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.flat.restore(state["flat"])
        self.step, self.budget.used = state["step"], state["used"]
        torch.set_rng_state(state["rng"])
        self.stats.copy_(state["stats"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.log(f"{self.name}: resumed at step {self.step}, {self.budget.used:.0f} s used")
        return True

    def run(self, *, deadline: float = float("inf")) -> bool:
        """Train until the budget is used, `deadline` (time.monotonic) has come or a stop is asked for. Returns whether it is
        finished.

        Always leaves a checkpoint. Which bucket a step uses depends on the seed and the step alone.
        """
        names, weights = list(self.steps), [self.weights[name] for name in self.steps]
        last_log = last_save = time.monotonic()
        logged_step, rate = self.step, 0.0
        while not (self.budget.done(self.step) or self.stop.requested or time.monotonic() >= deadline):
            chunk = 1 if rate == 0 else max(1, int(CHUNK_SECONDS * rate))
            if self.budget.steps is not None:
                chunk = min(chunk, self.budget.steps - self.step)
            began = time.monotonic()
            for _ in range(chunk):
                self.flat.lr.fill_(self.schedule.at(self.budget.progress(self.step), self.step))
                self.steps[random.Random(f"{self.seed} {self.step}").choices(names, weights)[0]]()
                self.step += 1
                if self.stop.requested:
                    break
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.monotonic()
            self.budget.used += now - began
            rate = chunk / max(now - began, 1e-6)
            if now - last_log >= self.log_seconds:
                self._report(logged_step, now - last_log)
                last_log, logged_step = now, self.step
            if now - last_save >= self.checkpoint_seconds:
                self.save()
                if self.on_checkpoint is not None:
                    self.on_checkpoint()
                last_save = last_log = time.monotonic()
                logged_step = self.step
        self._report(logged_step, time.monotonic() - last_log)
        self.save()
        return self.budget.done(self.step)

    def _report(self, since: int, seconds: float) -> None:
        loss, norm, count, *extra = self.stats.tolist()
        self.stats.zero_()
        if not count:
            return
        self.losses.append((self.step, loss / count))
        more = "".join(f" {name} {value / count:.4f}" for name, value in zip(self.extra_names, extra, strict=True))
        pace, done = (self.step - since) / max(seconds, 1e-6), 100 * self.budget.progress(self.step)
        self.log(
            f"{self.name} step {self.step} {done:.0f}% loss {loss / count:.4f} norm {norm / count:.3f}{more} "
            f"lr {self.flat.lr.item():.2e} skipped {int(self.flat.skipped.item())} | "
            f"{pace:.1f} steps/s {pace * self.batch:.0f} scenes/s"
        )
