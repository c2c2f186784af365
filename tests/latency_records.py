"""Records for tests, and a session over a fake bundle whose clocks are planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.latency_energy import EnergyMeter
from benchmarks.latency_history import Record, Reference, Times
from benchmarks.latency_run import Bench
from benchmarks.latency_timing import Sample, Stopwatch
from benchmarks.latency_yardstick import cpu_gemm

GEMM = "GEMM 8x8x8 fp32, a fake"
SMALL = (64, 64, 64)  # a real GEMM


def record(*, ratio: float = 10.0, run: str = "0" * 12, peers: dict[str, float] | None = None, **changes: Any) -> Record:
    """A denoiser's run that took `ratio` times the yardstick's 2 ms, with noise of 1 %. peers: names and milliseconds."""
    ratios = tuple(float(value) for value in ratio * np.exp(0.01 * np.random.default_rng(int(run, 16)).standard_normal(30)))
    references = {GEMM: Reference(ms=2.0, ratio=float(np.median(ratios)), ratios=ratios)}
    for name, ms in (peers or {}).items():
        references[name] = Reference(ms=ms, ratio=2 * ratio / ms, ratios=(2 * ratio / ms,) * 3, rms_error=1e-3)
    times = Times(p50=2 * ratio, p90=2.2 * ratio, p99=2.5 * ratio)
    values: dict[str, Any] = {
        "run": run,
        "accepted": False,
        "date": "2026-01-02T03:04:05+00:00",
        "model": "sana-tiny",
        "bundle": "ab" * 32,
        "component": "denoiser",
        "backend": "onnxruntime",
        "precision": "fp16",
        "width": 512,
        "height": 512,
        "batch": 1,
        "steps": 1,
        "rounds": 30,
        "device": times,
        "wall": times,
        "yardstick": GEMM,
        "references": references,
        "memory_bytes": 1 << 20,
        "energy_j": None,
        "energy_note": "not measured: there is no GPU",
        "machine": "a machine",
        "versions": {"python": "3.11"},
        "command": "python benchmarks/latency.py",
        "commit": "0123456789ab",
        "note": "",
    }
    return Record(**{**values, **changes})


def planted(mean_ms: float, seed: int, slower: Callable[[], float] = lambda: 1.0, noise: float = 0.01) -> Stopwatch:
    """A stopwatch that runs what it is given, and says that it took `mean_ms` times slower(), with noise."""
    rng = np.random.default_rng(seed)

    def watch(call: Callable[[], object]) -> Sample:
        call()
        ms = mean_ms * slower() * float(np.exp(noise * rng.standard_normal()))
        return Sample(ms, ms)

    return watch


class Plant:
    """How much slower the work is; how often it was measured."""

    slower = 1.0

    def __init__(self) -> None:
        self.seed = 0

    def make(self, run: str, *, gpu: bool, num_threads: int = 1) -> Bench:
        assert not gpu
        self.seed += 1
        gemm = replace(cpu_gemm(SMALL), stopwatch=planted(2.0, self.seed))
        clock = planted(20.0, 1000 + self.seed, lambda: self.slower)
        return Bench(gpu=False, run=run, yardstick=gemm, meter=EnergyMeter(None), watch=lambda stopwatch: clock)
