"""One run of latency.py over one bundle: parity first, then times, then the comparison with the history."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import ROOT
from benchmarks.latency_check import Limits, Verdict, compare
from benchmarks.latency_figures import record_figures
from benchmarks.latency_history import History, Record
from benchmarks.latency_run import Bench, Plan, measure
from benchmarks.latency_work import Work, graph_inputs
from engines.bundle import Bundle
from engines.errors import BuildError, NoGpuError, RequestError
from engines.gpu import device_info
from engines.spec import ComponentName
from runtime import SanaEngine

if TYPE_CHECKING:
    from engines.parity_report import ErrorStats
    from sana_ref.checkpoint import Checkpoint

__all__ = ["TINY", "Session", "has_gpu", "judge", "row", "tiny_bundle"]

TINY, TINY_BUNDLE = ROOT / "models" / "sana-tiny", ROOT / "out" / "sana-tiny"
ACCEPT = "Or, that later runs like this are compared with this one: --accept"
BUSY_PERCENT = 5.0  # caches that are shared with others slow a GEMM and a model differently: by up to 4 % as measured
CHECKED: tuple[ComponentName, ...] = ("text_encoder", "denoiser", "decoder")  # against PyTorch in the same run


def asked_sizes(options: argparse.Namespace, engine: SanaEngine) -> list[tuple[int, int]]:
    """Widths and heights, px."""
    side = engine.manifest.ranges.opt_side
    return options.sizes or [(options.width or side, options.height or side)]


def works(options: argparse.Namespace, engine: SanaEngine) -> Iterator[Work]:
    """What was asked for, in order. The text encoder knows no size: it comes once a batch."""
    sizes = asked_sizes(options, engine)
    for component in options.components:
        for width, height in [(options.text_tokens, 0)] if component == "text_encoder" else sizes:
            for batch in options.batches:
                steps = options.steps if component == "picture" else 1
                yield Work(component=component, width=width, height=height, batch=batch, steps=steps)


def to_check(asked: Sequence[Work]) -> list[tuple[ComponentName, Work]]:
    """Components against PyTorch, each once: those that were asked for, and at their sizes and batches those that pictures are
    drawn by. The smallest batch comes first."""
    found: dict[tuple[ComponentName, Work], None] = {}
    for work in sorted(asked, key=lambda each: each.batch):
        for component in CHECKED:
            if work.component == component:
                found[component, work] = None
            elif work.component == "picture":  # its prompts with their instruction
                size = (0, 0) if component == "text_encoder" else (work.width, work.height)
                found[component, Work(component=component, width=size[0], height=size[1], batch=work.batch)] = None
    return list(found)


def complaints(
    engine: SanaEngine, checkpoint: Checkpoint | None, asked: Sequence[Work]
) -> tuple[list[str], dict[str, dict[str, ErrorStats]]]:
    """What is not exact enough: by the bundle's golden inputs and, on a GPU with a checkpoint, by PyTorch for each work that was
    asked for, of a picture its parts. A text encoder in 4 or 8 bits has its golden inputs alone.

    And the errors by component, of the first size and the smallest batch.
    """
    from benchmarks.latency_parity import engine_errors, golden_complaints
    from benchmarks.latency_plan import has_narrow_weights
    from engines.parity_report import bound_from, check_size

    wrong = golden_complaints(engine)
    found: dict[str, dict[str, ErrorStats]] = {}
    if checkpoint is None or engine.backend != "tensorrt":
        return wrong, found
    for component, work in to_check(asked):
        if component == "text_encoder" and has_narrow_weights(engine.bundle, component):
            continue
        errors = engine_errors(engine, component, checkpoint, graph_inputs(engine, work))
        found.setdefault(component, errors)
        size = f"{work.width} tokens, " if component == "text_encoder" else f"{work.width} x {work.height}, "
        wrong += [
            f"{component}, {size if work.width else ''}batch {work.batch}: {text}"
            for text in check_size(errors["engine"], bound_from(errors["pytorch"]))
        ]
    print(json.dumps({name: {who: e.model_dump() for who, e in rows.items()} for name, rows in found.items()}))
    return wrong, found


def row(found: Record) -> str:
    """One record as a line for a terminal."""
    yardstick = found.references[found.yardstick]
    peers = "".join(
        f"; {name} {other.ms:.3f} ms{' by the wall clock' if other.clock == 'wall' else ''}"
        f"{f' ({other.note})' if other.note else ''}, {1 / other.ratio:.2f} x ours"
        for name, other in found.references.items()
        if other.rms_error is not None
    )
    energy = f"{found.energy_j:.3g} J" if found.energy_j else f"energy {found.energy_note}"
    memory = "memory unknown, another program used the GPU" if found.memory_bytes is None else f"{found.memory_bytes / 1e6:.0f} MB"
    clock = f"; GPU at {found.clock_mhz:.0f} MHz" if found.clock_mhz else ""
    return (
        f"{found.title}: p50 {found.device.p50:.3f}, p90 {found.device.p90:.3f}, p99 {found.device.p99:.3f} ms "
        f"(wall {found.wall.p50:.3f}); {yardstick.ratio:.4f} of {found.yardstick} ({yardstick.ms:.3f} ms){peers}; "
        f"{memory}; {energy}{clock}"
    )


def judge(now: Record, then: Record | None, limits: Limits) -> Verdict | None:
    """None if there is nothing to be judged by. Where other programs took the processor, the percentage is BUSY_PERCENT larger."""
    if then is None:
        return None
    if now.was_busy or then.was_busy:
        limits = replace(limits, percent=limits.percent + BUSY_PERCENT)
    mine, old = now.references[now.yardstick], then.references[now.yardstick]  # runs of one key have the same
    return compare(mine.ratios, old.ratios, yardstick_ms=mine.ms, limits=limits)


def unlike(now: Record, then: Record) -> str:
    """Why they are not compared, and what to do."""
    if (sorted(now.references), now.turns) == (sorted(then.references), then.turns):  # peers wait for the processor
        return f"NOT COMPARED: run {then.run} of {then.date}, the last accepted one, was on {then.machine}. {ACCEPT} {now.run}"
    turns = f" ({then.turns}, and now {now.turns})" if now.turns != then.turns else ""
    return (
        f"NOT COMPARED: run {then.run} of {then.date}, the last accepted one, took turns with {', '.join(then.references)}; this "
        f"one with {', '.join(now.references)}{turns}. Give the same --peers, and --record for a floor. {ACCEPT} {now.run}"
    )


class Session:
    """One run of the program over one bundle."""

    def __init__(self, options: argparse.Namespace, bundle: Path, run: str) -> None:
        Bundle.open(bundle, verify=False)  # that of the last session too, before the first measures
        self.options, self.bundle, self.run = options, bundle, run
        self.history, self.limits = History(options.history), Limits(percent=options.percent, floor_ms=options.floor_ms)
        self.records: list[Record] = []  # what was measured
        self.checkpoint: Checkpoint | None = None
        if options.model is not None:
            from sana_ref.checkpoint import load

            self.checkpoint = load(options.model)
        self.plan = Plan(
            rounds=options.rounds, pictures=options.pictures, peers=options.peers, model=options.model, against=options.against,
            note=options.note, floor=options.record,
        )  # fmt: skip

    def __call__(self) -> int:
        """The exit code. Where it is interrupted, or a work fails, what was measured before is kept, and not accepted."""
        records: list[tuple[Work, Record]] = []
        try:
            code, kept = self.measured(records)
        except BaseException:  # Ctrl-C above all
            self.keep([found for _, found in records], accept=False)
            raise
        self.keep(kept, accept=self.options.accept is not None)
        return code

    def measured(self, records: list[tuple[Work, Record]]) -> tuple[int, list[Record]]:
        """The exit code, and the records to keep. records: what is measured is appended."""
        gpu = has_gpu() and self.options.backend != "onnxruntime"
        bench = self.bench(gpu)
        with self.open() as engine:
            if gpu and engine.backend != "tensorrt":
                bench = self.bench(False)
            asked = list(works(self.options, engine))
            for work in asked:  # before hours may pass
                work.check(engine)
            self.check_model(engine)
            if self.options.record and engine.backend != "tensorrt":
                raise RequestError(
                    f"--record: got {engine.backend}; figures are of engines beside a --model. benchmarks/picture.py is for CPUs."
                )
            wrong, errors = complaints(engine, self.checkpoint, asked)
            if wrong:
                print("\n".join(["the engine is not exact enough; nothing is timed", *wrong]))
                return 1, []
            for work in asked:
                records.append((work, measure(engine, work, bench, self.plan, self.checkpoint)))
                print(row(records[-1][1]), flush=True)
            self.records = [found for _, found in records]
            if self.options.record and not self.record(engine, self.records, errors):
                return 1, []
        return self.check(records, bench) if self.options.check else (0, [found for _, found in records])

    def check_model(self, engine: SanaEngine) -> None:
        """Raises RequestError if the peers would have other weights. On a GPU `complaints` compares outputs, and nothing of several
        GB is read for a digest."""
        checkpoint = self.checkpoint
        if checkpoint is not None and engine.backend != "tensorrt" and checkpoint.digest != engine.manifest.model_digest:
            raise RequestError(
                f"--model: got {self.options.model} (digest {checkpoint.digest[:12]}); {self.bundle} was made from "
                f"{engine.manifest.model} (digest {engine.manifest.model_digest[:12]}). Give that one, or build from this one."
            )

    def open(self) -> SanaEngine:
        return SanaEngine(self.bundle, backend=self.options.backend, num_threads=self.options.threads, progress=False)

    def bench(self, gpu: bool) -> Bench:
        bench = Bench.make(self.run, gpu=gpu, num_threads=self.options.threads)
        if gpu:
            from engines import tensorrt

            bench.extra_versions["tensorrt"] = f"{tensorrt.flavor()} {tensorrt.version()}"
        if self.options.kernels:
            from benchmarks.latency_kernels import Profiler

            bench.kernels = Profiler(gpu=gpu, num_threads=self.options.threads)
        return bench

    def record(self, engine: SanaEngine, records: Sequence[Record], errors: dict[str, dict[str, ErrorStats]]) -> bool:
        assert self.checkpoint is not None  # latency.py asks for --model
        options = self.options
        return record_figures(
            engine, self.checkpoint, records, errors, steps=options.steps, pictures=options.pictures, note=options.note
        )

    def check(self, records: Sequence[tuple[Work, Record]], bench: Bench) -> tuple[int, list[Record]]:
        """The exit code, and the records to keep: 1 if something became slower, 2 if something cannot be compared though it was
        accepted before, beside others. What looks slower is measured again, by an engine that is opened anew, up to --confirm
        times: the run whose ratio is smallest stands."""
        kept, slower, alone = [], [], False
        for work, found in records:
            then = self.history.last_accepted(found.key)
            verdict = judge(found, then, self.limits)
            for _ in range(self.options.confirm):
                if verdict is None or not verdict.regression:
                    break
                print(f"{found.title}: {verdict}; measured again", flush=True)
                with self.open() as engine:
                    again = measure(engine, work, bench, self.plan, self.checkpoint)
                if again.key == found.key:  # a peer may have failed its check this time
                    found = min(found, again, key=lambda each: each.references[each.yardstick].ratio)
                verdict = judge(found, then, self.limits)
            kept.append(found)
            if verdict is None or then is None:
                other = self.history.last_of_work(found.work)
                alone |= other is not None
                why = unlike(found, other) if other else "the first of its kind, so there is nothing to compare with"
                print(f"{found.title}: {why}")
            else:
                word = "SLOWER" if verdict.regression else "ok"
                busy = f"; the machine was busy, so {BUSY_PERCENT:g} % more are let by" if found.was_busy or then.was_busy else ""
                print(f"{found.title}: {word}, {verdict}, against run {then.run} of {then.date}{busy}")
                slower += [found.title] if verdict.regression else []
        if slower:
            print(
                f"slower than the last accepted run by over {self.limits.percent:g} % and {self.limits.floor_ms:g} ms: "
                f"{'; '.join(slower)}. If that is meant: --accept {self.run}"
            )
        return 1 if slower else 2 if alone else 0, kept

    def keep(self, records: Sequence[Record], *, accept: bool) -> None:
        """Append them to the history, if it is to have them. accept: not only the first of their work."""
        if self.options.no_history or not records:
            return
        done = []
        for found in records:
            accepted = accept or self.history.last_of_work(found.work) is None
            done.append(found.model_copy(update={"accepted": accepted}))
        self.history.append(done)
        print(f"run {self.run}, {'accepted' if all(each.accepted for each in done) else 'kept'}: {self.history.folder}")


def has_gpu() -> bool:
    try:
        device_info()
    except NoGpuError:
        return False
    return True


def tiny_bundle() -> Path:
    """sana-tiny's bundle, built first where there is none. Raises BuildError if that fails."""
    if not (TINY_BUNDLE / "manifest.json").is_file():
        target = "current" if has_gpu() else "onnx"
        command = [sys.executable, str(ROOT / "export" / "build_engine.py"), "--model", str(TINY), "--precision", "fp16"]
        if subprocess.run([*command, "--target", target, "--out", str(TINY_BUNDLE)]).returncode:
            raise BuildError(f"{TINY_BUNDLE}: the build failed, as said above. Mend that, or give --bundle.")
    return TINY_BUNDLE
