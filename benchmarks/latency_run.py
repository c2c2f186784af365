"""Measures works of an open bundle, each by turns with the yardstick and the peers, and writes down what was found as records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks import figures
from benchmarks.latency_energy import EnergyMeter
from benchmarks.latency_history import Kernels, Record, Reference, Times
from benchmarks.latency_timing import (
    Call,
    Rounds,
    Sample,
    Stopwatch,
    Task,
    calls_for,
    interleave,
    peak_memory,
    percentiles,
    reset_peak_memory,
)
from benchmarks.latency_work import Work, component_inputs, num_tokens, open_task
from benchmarks.latency_yardstick import cpu_gemm, gpu_gemm
from engines.errors import RequestError
from engines.spec import ComponentName

if TYPE_CHECKING:
    from runtime import SanaEngine
    from sana_ref.checkpoint import Checkpoint

__all__ = ["GEMM", "Bench", "Plan", "gpu_bus_id", "gpu_memory_used", "measure"]

GEMM = "gemm"  # what Plan.against calls the yardstick; records have its whole name
YARDSTICK_SHARE = 0.2  # of the work's time: a shorter yardstick would add its own noise


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure. model: a checkpoint's folder; needed for peers (keys of latency_peers.PEERS)."""

    rounds: int = 60
    pictures: int = 10  # rounds of a picture
    warm_up: int = 3
    least_ms: float = 5.0  # of one sample
    peers: Sequence[str] = ()
    model: Path | None = None
    against: str = GEMM  # the yardstick that --check judges by
    note: str = ""
    energy_s: float = 1.0  # how long energy is counted
    floor: bool = False  # measure a component's too, on a GPU


@dataclass
class Bench:
    """What lasts over several works on one device. watch: put around every stopwatch of the works (tests plant slowness there)."""

    gpu: bool
    run: str
    yardstick: Task
    meter: EnergyMeter
    memory_before: int = 0  # bytes of the GPU in use before the bundle was opened
    watch: Callable[[Stopwatch], Stopwatch] = field(default=lambda stopwatch: stopwatch)
    kernels: Callable[[SanaEngine, Work], Kernels | None] = field(default=lambda engine, work: None)
    extra_versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, run: str, *, gpu: bool, num_threads: int = 1) -> Bench:
        """Before the bundle is opened, so that its memory can be told. num_threads: of ONNX Runtime."""
        yardstick = gpu_gemm() if gpu else cpu_gemm(num_threads=num_threads)
        meter = EnergyMeter(gpu_bus_id() if gpu else None)
        return cls(gpu=gpu, run=run, yardstick=yardstick, meter=meter, memory_before=gpu_memory_used() if gpu else 0)


def gpu_memory_used() -> int:
    """Bytes of the GPU that are in use, whoever uses them. Memory that PyTorch holds for later is given back first."""
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _gpu_memory(bench: Bench) -> int | None:
    """Bytes of the GPU beyond those of before. None where another program gave back more than is in use for ours."""
    taken = gpu_memory_used() - bench.memory_before
    return taken if taken >= 0 else None


def gpu_bus_id() -> str:
    """The PCI address of the first visible GPU."""
    from cuda.bindings import driver

    status, device = driver.cuDeviceGet(0)
    if not int(status):
        status, name = driver.cuDeviceGetPCIBusId(16, device)
        if not int(status):
            return cast(str, name.split(b"\0")[0].decode())
    raise RequestError(f"got CUDA's error {status} for the first GPU; expected its PCI address. Run after a CUDA context was made.")


def measure(engine: SanaEngine, work: Work, bench: Bench, plan: Plan, checkpoint: Checkpoint | None = None) -> Record:
    """One work, in a fresh record that is not accepted.

    checkpoint: of plan.model; peers are left out without it. Raises RequestError as Work.check and as plan.against names something
    that was not measured.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open_task(engine, work))
        task = replace(opened, stopwatch=bench.watch(opened.stopwatch))
        if not bench.gpu:
            reset_peak_memory()
        picture = work.component == "picture"
        if picture:
            task.sample()  # engines load
        else:
            task = replace(task, calls=calls_for(task, plan.least_ms))
        last = task.sample()
        memory = _gpu_memory(bench) if bench.gpu else peak_memory()
        least_ms = max(plan.least_ms, YARDSTICK_SHARE * last.wall_ms * task.calls)
        gemm = bench.yardstick.name
        references = {gemm: replace(bench.yardstick, calls=calls_for(bench.yardstick, least_ms))}
        errors: dict[str, float] = {}
        if plan.peers and checkpoint is not None:
            errors = _add_peers(stack, references, engine, work, bench, plan, checkpoint)
        if bench.gpu and plan.floor and checkpoint is not None and (floor := _floor(engine, work, checkpoint)) is not None:
            references[floor.name] = replace(floor, calls=calls_for(floor, plan.least_ms))
        against = _yardstick(bench, plan)
        if against not in references:
            raise RequestError(f"--against: got {plan.against!r}; measured here were {', '.join(references)}. Add it to --peers.")
        clocks: list[float] = []
        rounds = interleave(
            replace(task, stopwatch=_noting(task.stopwatch, bench.meter, clocks)),
            list(references.values()),
            rounds=plan.pictures if picture else plan.rounds,
            warm_up=1 if picture else plan.warm_up,
        )
        joules = bench.meter.joules(lambda: task.stopwatch(task.call), least_s=plan.energy_s)
    clock_mhz = float(np.median(clocks[-len(rounds.samples) :])) if clocks else None
    kernels = bench.kernels(engine, work)
    return _record(engine, work, bench, plan, rounds, errors, memory=memory, joules=joules, clock_mhz=clock_mhz, kernels=kernels)


def _noting(stopwatch: Stopwatch, meter: EnergyMeter, clocks: list[float]) -> Stopwatch:
    """It also appends the GPU's clock after each sample, before it falls."""

    def watch(call: Call) -> Sample:
        found = stopwatch(call)
        clock = meter.clock_mhz()
        if clock:
            clocks.append(clock)
        return found

    return watch


def _yardstick(bench: Bench, plan: Plan) -> str:
    """By what a work is judged."""
    return bench.yardstick.name if plan.against == GEMM else plan.against


def _floor(engine: SanaEngine, work: Work, checkpoint: Checkpoint) -> Task | None:
    """Products of the least that the work could take; None where there are none."""
    from benchmarks.latency_floor import floor_of
    from benchmarks.latency_plan import has_narrow_weights

    if work.component == "picture" or (work.component == "text_encoder" and has_narrow_weights(engine.bundle, "text_encoder")):
        return None
    precision = engine.manifest.precision[cast(ComponentName, work.component)]
    floor = floor_of(checkpoint, work, precision, tokens=num_tokens(engine, work))
    return None if floor is None else floor.task()


def _add_peers(
    stack: ExitStack,
    references: dict[str, Task],
    engine: SanaEngine,
    work: Work,
    bench: Bench,
    plan: Plan,
    checkpoint: Checkpoint,
) -> dict[str, float]:
    """Their errors. They are among the references until the stack is left, so that nothing holds their memory then."""
    peers = _peers(stack, engine, work, bench, plan, checkpoint)
    stack.callback(references.clear)
    for name, peer in peers.items():
        once = work.component == "picture"
        references[name] = peer.task if once else replace(peer.task, calls=calls_for(peer.task, plan.least_ms))
    return {name: peer.rms_error for name, peer in peers.items()}


def _peers(stack: ExitStack, engine: SanaEngine, work: Work, bench: Bench, plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    from benchmarks.latency_parity import dtype_of
    from benchmarks.latency_peers import checked_peers
    from benchmarks.latency_pipelines import checked_pipelines

    component = _decisive(work)
    dtype = dtype_of(component, engine.manifest.precision[component] if bench.gpu else "fp32")  # portable: fp32
    device = "cuda" if bench.gpu else "cpu"
    assert plan.model is not None
    if work.component == "picture":
        return stack.enter_context(checked_pipelines(plan.model, checkpoint, work, plan.peers, dtype=dtype, device=device))
    inputs = component_inputs(engine, work)
    return stack.enter_context(checked_peers(component, plan.model, checkpoint, inputs, plan.peers, dtype=dtype, device=device))


def _decisive(work: Work) -> ComponentName:
    """The component whose precision is the work's."""
    return cast(ComponentName, "denoiser" if work.component == "picture" else work.component)


def _record(
    engine: SanaEngine,
    work: Work,
    bench: Bench,
    plan: Plan,
    rounds: Rounds,
    errors: dict[str, float],
    *,
    memory: int | None,
    joules: float | None,
    clock_mhz: float | None,
    kernels: Kernels | None,
) -> Record:
    references = {}
    for name, times in rounds.references.items():
        ratios = tuple(float(f"{ratio:.6g}") for ratio in rounds.ratios(name))
        references[name] = Reference(
            ms=float(np.median(times)),
            ratio=float(np.median(ratios)),
            ratios=ratios,
            rms_error=errors.get(name),
            clock="wall" if name in rounds.by_wall else "device",
            note=rounds.notes.get(name, ""),
        )
    device = percentiles([sample.ms for sample in rounds.samples])
    wall = percentiles([sample.wall_ms for sample in rounds.samples])
    manifest = engine.manifest
    return Record(
        run=bench.run,
        accepted=False,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=manifest.model,
        bundle=engine.bundle.digest,
        component=work.component,
        backend=engine.backend,
        precision=str(manifest.precision[_decisive(work)]),
        width=work.width,
        height=work.height,
        batch=work.batch,
        steps=work.steps,
        rounds=len(rounds.samples),
        device=Times(p50=device.p50, p90=device.p90, p99=device.p99),
        wall=Times(p50=wall.p50, p90=wall.p90, p99=wall.p99),
        yardstick=_yardstick(bench, plan),
        references=references,
        turns="each first",
        memory_bytes=memory,
        energy_j=joules,
        energy_note=bench.meter.why,
        clock_mhz=clock_mhz,
        kernels=kernels,
        machine=figures.machine() if bench.gpu else figures.machine().rpartition(", ")[2],
        versions=figures.versions() | bench.extra_versions,
        command=figures.command(),
        commit=figures.commit(),
        note=plan.note,
    )
