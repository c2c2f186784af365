"""Takes the speed figures of Sana with random weights on the GPU that is here, and builds what they need. What is done stays done.

    python benchmarks/take_figures.py --list
    python benchmarks/take_figures.py                              # all of them
    python benchmarks/take_figures.py steps decode --limit 600     # two groups, ten minutes of them; the next call goes on
    python benchmarks/take_figures.py steps.4096px whole.runtime   # two figures, and the bundles that they need

A group has a checkpoint, bundles of it and figures of those. Its bundles are built at the same time, each with its share of the
processor's cores; then figures are taken one at a time, with nothing beside them, and appended to benchmarks/results/figures.jsonl,
and the runs that they are of to benchmarks/history. What failed is said, with the end of its log, and the others go on; the exit
code is 1. It is 3 if the time was over. A group's build cache, which is as large as its bundles, is removed once all of them are
built; if one failed, or was not asked for, it stays for the next call. --clean removes checkpoint, bundles and cache of a group
whose figures are all taken, in this call or before. Remove --out to take all of them again, of changed code for example.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

from benchmarks.figures import ROOT
from engines.errors import RequestError, SanaError
from engines.spec import nearest
from runtime.together import default_threads

__all__ = ["GROUPS", "Group", "Runner", "asked_for", "main"]

LATENCY = ("benchmarks/latency.py", "--rounds", "50", "--pictures", "50", "--record", "--note", "random weights")
# What kernels take, for the report's roofline: kept in the history, and no figure.
KERNELS = ("benchmarks/latency.py", "--rounds", "50", "--kernels", "--peers", "none", "--note", "random weights")
RUNTIME = ("benchmarks/runtime_figures.py", "--record", "--note", "random weights")
SPARED = "random weights; max-autotune without Triton's template for depthwise convolutions"
COMPILED = ("--peers", "eager,reduce-overhead,max-autotune", "--note", SPARED)
# That template takes a thousand times as long there as cuDNN, and timing it half an hour (docs/latency.md).
TUNING = {"TORCHINDUCTOR_AUTOTUNE_CHOICE_DESC_REGEX": "^(?!.*GROUPS=[0-9]{4})"}
NEEDED_S = 60  # a figure is not begun if less is left: the shortest take this long
POLL_S = 0.2  # between two looks at what runs
STOP_S = 5.0  # from an interrupt to the end of a process that does not mind it


class TimeOver(SanaError):
    """The limit came first."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Words of a command that begin with @ are folders of the group: @model, called as its variant, and @NAME of a bundle."""

    about: str
    checkpoint: tuple[str, ...]  # arguments of random_checkpoint.py
    bundles: Mapping[str, tuple[str, ...]]  # arguments of build_engine.py
    figures: Mapping[str, tuple[str, ...]]  # programs with their arguments
    common: tuple[str, ...] = field(default=("--max-batch", "2"))  # of all bundles

    @property
    def model(self) -> str:
        """What the checkpoint's folder is called, and so its runs in the history."""
        return dict(pairwise(self.checkpoint)).get("--variant", "model")


def _latency(bundles: str, components: str, *more: str) -> tuple[str, ...]:
    return (*LATENCY, "--model", "@model", "--bundle", *bundles.split(), "--components", components, *more)


def _kernels(bundles: str, components: str, *more: str) -> tuple[str, ...]:
    return (*KERNELS, "--bundle", *bundles.split(), "--components", components, *more)


_STEP = ("--components", "text_projection,denoiser")
_DECODER = ("--components", "decoder", "--min-side", "256", "--default-side", "1024")
_FP8, _INT8 = ("--precision", "fp8", "--no-calibrate"), ("--precision", "int8", "--no-calibrate")

GROUPS: Mapping[str, Group] = {
    "decode": Group(
        about="DC-AE's decoder alone, 1024 and 4096 px",
        checkpoint=("--variant", "sana_600m_1024px", "--small-text-encoder"),
        bundles={
            "bf16": _DECODER,
            "fp8": (*_DECODER, "--decoder-precision", "fp8", "--no-calibrate"),
            "int8": (*_DECODER, "--decoder-precision", "int8", "--no-calibrate"),
            "large": (*_DECODER, "--max-side", "4096", "--max-batch", "1"),
        },
        figures={
            "1024px": _latency("@bf16 @fp8 @int8", "decoder", "--sizes", "1024", *COMPILED),
            "4096px": _latency("@large", "decoder", "--sizes", "4096", *COMPILED),
            "peak": (*RUNTIME, "@large", "--decoder", "--side", "4096"),
            "kernels": _kernels("@bf16 @fp8 @int8", "decoder", "--sizes", "1024"),
            "4096px-kernels": _kernels("@large", "decoder", "--sizes", "4096"),
        },
    ),
    "sprint": Group(
        about="Sprint, one step, prompt to PNG",
        checkpoint=("--variant", "sprint_1600m_1024px"),
        bundles={"fp16": ()},
        figures={"picture": _latency("@fp16", "picture", "--steps", "1", *COMPILED)},
    ),
    "steps": Group(
        about="steps of Sana-1.6B in fp16, FP8 and INT8",
        checkpoint=("--variant", "sana_1600m_1024px", "--small-text-encoder"),
        bundles={
            "fp16": (*_STEP, "--max-side", "4096"),
            "fp8": (*_STEP, *_FP8, "--max-side", "4096"),
            "int8": (*_STEP, *_INT8),
        },
        figures={
            "formats": _latency("@fp16 @fp8 @int8", "denoiser", "--sizes", "1024", "--peers", "none"),
            "kernels": _kernels("@fp16 @fp8 @int8", "denoiser", "--sizes", "1024"),
            "1024px": _latency("@fp16 @fp8", "denoiser", "--sizes", "1024", *COMPILED),
            "2048px": _latency("@fp16 @fp8", "denoiser", "--sizes", "2048", *COMPILED),
            "4096px": _latency("@fp16 @fp8", "denoiser", "--sizes", "4096", *COMPILED),
        },
    ),
    "small": Group(
        about="steps of Sana-0.6B in fp16 and FP8",
        checkpoint=("--variant", "sana_600m_1024px", "--small-text-encoder"),
        bundles={"fp16": _STEP, "fp8": (*_STEP, *_FP8)},
        figures={
            "1024px": _latency("@fp16 @fp8", "denoiser", "--sizes", "1024", *COMPILED),
            "kernels": _kernels("@fp16 @fp8", "denoiser", "--sizes", "1024"),
        },
    ),
    "whole": Group(
        about="Sana-1.6B with Gemma: texts, pictures, start, memory, launches",
        checkpoint=("--variant", "sana_1600m_1024px"),
        bundles={"fp16": ("--max-side", "1024"), "fp8": ("--max-side", "1024", *_FP8)},
        figures={
            "picture": _latency("@fp8", "picture", *COMPILED),
            "runtime": (*RUNTIME, "@fp16", "--name", "1600m"),
            "text": _latency("@fp16", "text_encoder", "--batches", "2", "--text-tokens", "300", *COMPILED),
            "instructed": _latency("@fp16", "text_encoder", "--batches", "2", *COMPILED),
            "kernels": _kernels("@fp16", "text_encoder", "--batches", "2", "--text-tokens", "300"),
        },
    ),
}


class Runner:
    """Some figures of a group and the work that they need, below `out`/NAME."""

    def __init__(self, name: str, group: Group, figures: Sequence[str], out: Path, *, deadline: float = float("inf")) -> None:
        """deadline: of time.monotonic(), s. Raises TimeOver when it has come."""
        self.name, self.group, self.figures, self.folder, self.deadline = name, group, figures, out / name, deadline
        self.failed: list[str] = []

    def __call__(self) -> None:
        left = self.left()
        if not left:
            self._say("nothing is left to do")
            return
        (self.folder / "done").mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        self._all({"checkpoint": self._command("benchmarks/random_checkpoint.py", *self.group.checkpoint, "--out", "@model")})
        if not self._done("checkpoint"):
            return
        build = ("export/build_engine.py", "--model", "@model", "--target", "current", "--cache", str(self.folder / "cache"))
        needed = dict.fromkeys(name for figure in left for name in self._bundles(figure))
        builds = {name: (*build, *self.group.common, *self.group.bundles[name], "--out", f"@{name}") for name in needed}
        self._all({f"bundle {name}": self._command(*words) for name, words in builds.items()})
        if all(self._done(f"bundle {name}") for name in self.group.bundles):
            shutil.rmtree(self.folder / "cache", ignore_errors=True)  # no build is left that would read it
        for name in left:
            if missing := [each for each in self._bundles(name) if not self._done(f"bundle {each}")]:
                self._fail(f"figure {name}", f"it needs the bundle {', '.join(missing)}, which is not there")
                continue
            if self.deadline - time.monotonic() < NEEDED_S:
                raise TimeOver(f"{self.name}: {name} is not begun, for less than {NEEDED_S} s are left. Run it again to go on.")
            self._all({f"figure {name}": self._command(*self.group.figures[name])})

    def left(self) -> list[str]:
        """Those that were asked for and are not taken yet."""
        return [name for name in self.figures if not self._done(f"figure {name}")]

    def clean(self) -> None:
        """Remove all but the logs, and what says which figures are taken; nothing before all of the group are, asked for or not."""
        if not all(self._done(f"figure {name}") for name in self.group.figures):
            return
        for name in (self.group.model, "cache", *self.group.bundles):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for job in ("checkpoint", *(f"bundle {name}" for name in self.group.bundles)):
            (self.folder / "done" / job).unlink(missing_ok=True)

    def _bundles(self, figure: str) -> list[str]:
        return [name for name in self.group.bundles if f"@{name}" in self.group.figures[figure]]

    def _done(self, job: str) -> bool:
        return (self.folder / "done" / job).exists()

    def _command(self, program: str, *words: str) -> list[str]:
        folders = {f"@{name}": str(self.folder / name) for name in self.group.bundles}
        folders["@model"] = str(self.folder / self.group.model)
        return [sys.executable, str(ROOT / program), *(folders.get(word, word) for word in words)]

    def _all(self, jobs: Mapping[str, Sequence[str]]) -> None:
        """Those that are not done yet, at the same time."""
        jobs = {job: command for job, command in jobs.items() if not self._done(job)}
        threads = str(max(1, default_threads() // max(1, len(jobs))))
        environment = TUNING | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        if len(jobs) > 1:
            environment["OMP_NUM_THREADS"] = threads
        began = time.monotonic()
        with _processes() as running:
            for job, command in jobs.items():
                with (self.folder / "logs" / f"{job}.log").open("wb") as log:
                    running[job] = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
            left = dict(running)
            while left:  # each as it ends, so that what is done is kept when the time is over
                ended = {job: code for job, process in left.items() if (code := process.poll()) is not None}
                for job, code in ended.items():
                    del left[job]
                    if code:
                        self._fail(job, f"exit code {code}; {self._end(job)}")
                        continue
                    (self.folder / "done" / job).touch()
                    self._say(f"{job}: done after {time.monotonic() - began:.0f} s; {self._end(job, lines=1)}")
                if left and time.monotonic() >= self.deadline:
                    raise TimeOver(f"{self.name}, {', '.join(left)}: the time is over. Run it again to go on.")
                if not ended:
                    time.sleep(POLL_S)

    def _end(self, job: str, lines: int = 12) -> str:
        log = self.folder / "logs" / f"{job}.log"
        return f"{log}:\n  " + "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _fail(self, job: str, why: str) -> None:
        self.failed.append(job)
        self._say(f"{job}: {why}")

    def _say(self, words: str) -> None:
        print(f"{self.name}, {words}", flush=True)


@contextmanager
def _processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """None of them outlives the block."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        yield running
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)  # to one that has ended it does nothing
        stop = time.monotonic() + STOP_S
        for process in running.values():
            try:
                process.wait(max(0.0, stop - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def asked_for(words: Sequence[str], groups: Mapping[str, Group]) -> list[tuple[str, list[str]]]:
    """Groups, each with figures of it, in the order of `words`: GROUP or GROUP.FIGURE. No word means all groups.

    Neighbours of one group come together, so that their bundles are built at the same time.
    Raises RequestError for a word that names nothing.
    """
    found = []
    for word in words or groups:
        name, dot, figure = word.partition(".")
        if name not in groups:
            raise RequestError(f"group: got {name!r}; {nearest(name, tuple(groups))}.")
        figures = groups[name].figures
        if dot and figure not in figures:
            raise RequestError(f"figure of {name}: got {figure!r}; {nearest(figure, tuple(figures))}.")
        found += [(name, each) for each in ([figure] if dot else figures)]
    return [(name, list(dict.fromkeys(figure for _, figure in pairs))) for name, pairs in groupby(found, key=lambda pair: pair[0])]


def main(arguments: Sequence[str] | None = None, groups: Mapping[str, Group] = GROUPS) -> int:
    """The exit code: 0, 1 if something failed, 2 for a wrong word, 3 if the time was over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="GROUP[.FIGURE]", help=f"groups: {', '.join(groups)}")
    parser.add_argument("--list", action="store_true", help="the groups, and what is left to do of each")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="then it ends; the next call goes on")
    parser.add_argument("--clean", action="store_true", help="remove checkpoint, bundles and cache where a whole group is done")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "figures")
    options = parser.parse_args(arguments)
    try:
        deadline, failed = time.monotonic() + options.limit, False
        for name, figures in asked_for(options.words, groups):
            runner = Runner(name, groups[name], figures, options.out.resolve(), deadline=deadline)
            if options.list:
                print(f"{name}: {groups[name].about}; left: {', '.join(runner.left()) or 'nothing'}")
                continue
            runner()
            failed |= bool(runner.failed)
            if options.clean:
                runner.clean()
    except TimeOver as error:
        print(error, file=sys.stderr)
        return 3
    except SanaError as error:
        print(error, file=sys.stderr)
        return 2
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
