"""Turns, ratios and stopwatches, by a clock that the tests move; energy by an NVML that is not there."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
from fake_tensorrt import FakeCuda

from benchmarks.figures import ROOT
from benchmarks.latency_energy import EnergyMeter
from benchmarks.latency_timing import (
    Rounds,
    Sample,
    StreamMarks,
    Task,
    calls_for,
    interleave,
    percentiles,
)
from engines.errors import RequestError


class Clock:
    """Each call of a task takes what its list says next."""

    def __init__(self, **ms: list[float]) -> None:
        self.ms, self.order = {name: iter(values) for name, values in ms.items()}, []

    def task(self, name: str, calls: int = 1) -> Task:
        def watch(call: object) -> Sample:
            began = len(self.order)
            call()
            taken = sum(next(self.ms[each]) for each in self.order[began:])
            return Sample(taken, taken + 1)

        return Task(name, lambda: self.order.append(name), watch, calls)


def test_what_runs_before_each_changes() -> None:
    """Of three references each is before the work as often as the others, and before each other in both orders."""
    clock = Clock(**{name: [1] * 20 for name in ("work", "a", "b", "c")})
    interleave(clock.task("work"), [clock.task(name) for name in "abc"], rounds=6, warm_up=0)
    order = clock.order[: 6 * 4]
    assert order[:12] == ["a", "b", "c", "work", "b", "c", "a", "work", "c", "a", "b", "work"]
    assert order[12:] == ["c", "b", "a", "work", "b", "a", "c", "work", "a", "c", "b", "work"]
    pairs = Counter(pairwise(order))
    assert {pairs[name, "work"] for name in "abc"} == {2}
    assert {pairs[one, other] for one, other in permutations("abc", 2)} == {2}


def test_work_and_yardstick_take_turns() -> None:
    clock = Clock(work=[9, 10, 20, 30], a=[9, 1, 3, 1, 1], b=[9, 10, 10, 10, 10])
    rounds = interleave(clock.task("work"), [clock.task("a"), clock.task("b")], rounds=3, warm_up=1)
    assert clock.order == [*"ab", "work", *"ab", "work", *"ba", "work", *"ba", "work", *"ab"]
    assert [sample.ms for sample in rounds.samples] == [10, 20, 30]
    assert rounds.ratios("a") == (10 / 2, 20 / 2, 30 / 1)  # each by the mean of its neighbours
    assert rounds.ratios("b") == (1, 2, 3)


def test_a_yardstick_by_the_wall_clock() -> None:
    """The work's time too is then the wall clock's, which has one more here."""
    clock = Clock(work=[10, 20, 30], a=[1] * 4, b=[9] * 4)
    rounds = interleave(clock.task("work"), [clock.task("a"), replace(clock.task("b"), by_wall=True)], rounds=3, warm_up=0)
    assert rounds.references == {"a": (1,) * 4, "b": (10,) * 4}
    assert rounds.ratios("a") == (10, 20, 30)
    assert rounds.ratios("b") == (1.1, 2.1, 3.1)


def test_a_sample_is_the_mean_of_its_calls() -> None:
    clock = Clock(work=[1, 2, 3, 6])
    assert clock.task("work", calls=4).sample() == Sample(3, 13 / 4)


@pytest.mark.parametrize(("ms", "calls"), [(1.0, 3), (100.0, 1), (0.0, 5)])
def test_short_work_is_repeated(ms: float, calls: int) -> None:
    clock = Clock(work=[50, ms])
    assert calls_for(clock.task("work"), 5.0) == calls  # by the wall clock, which has one more here


def test_too_few_rounds_and_names_twice_are_refused() -> None:
    clock = Clock()
    with pytest.raises(RequestError, match="got 2; expected at least 3"):
        interleave(clock.task("work"), [], rounds=2, warm_up=0)
    with pytest.raises(RequestError, match="expected a name each"):
        interleave(clock.task("a"), [clock.task("a")], rounds=3, warm_up=0)


def test_percentiles() -> None:
    found = percentiles([float(n) for n in range(101)])
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)


def test_marks_on_the_runtimes_stream() -> None:
    cuda, done = FakeCuda(), []
    sample = StreamMarks(cuda)(lambda: cuda.enqueue(lambda: done.append(1)))
    assert done == [1]
    assert sample.ms == pytest.approx(1.0)  # the fake's events are a millisecond apart
    assert sample.wall_ms > 0


HELD = """
import numpy as np
from benchmarks.latency_timing import peak_memory, reset_peak_memory
reset_peak_memory()
before = peak_memory()
np.ones(8 << 20)
print(peak_memory() - before)
"""


@pytest.mark.slow
def test_peak_memory_sees_what_was_held() -> None:
    """In a process of its own: of one that has held much, the system may take pages away meanwhile."""
    found = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) >= 60 << 20


class Nvml(SimpleNamespace):
    NVMLError = RuntimeError
    NVML_CLOCK_SM = 1

    def __init__(self, *, supported: bool = True) -> None:
        super().__init__(mJ=0, MHz=1755, supported=supported)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: bytes) -> str:
        return bus_id.decode()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "0000:1b:00.0"
        if not self.supported:
            raise RuntimeError("Not Supported")
        return self.mJ

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert (handle, kind) == ("0000:1b:00.0", self.NVML_CLOCK_SM)
        if not self.MHz:
            raise RuntimeError("Not Supported")
        return self.MHz


def test_energy_of_a_call() -> None:
    nvml = Nvml()
    meter = EnergyMeter("0000:1b:00.0", nvml=nvml)

    def call() -> None:
        nvml.mJ += 250

    assert meter.joules(call, least_s=0.01) == pytest.approx(0.25)
    assert meter.joules(lambda: None, least_s=0) is None  # the counter stood still
    assert meter.why == ""


def test_why_there_is_no_energy() -> None:
    assert EnergyMeter(None).why == "not measured: there is no GPU"
    refused = EnergyMeter("0000:1b:00.0", nvml=Nvml(supported=False))
    assert refused.why == "not measured: NVML says Not Supported"
    assert refused.joules(lambda: None) is None


def test_the_gpus_clock() -> None:
    """Also of a GPU whose energy NVML does not say."""
    nvml = Nvml(supported=False)
    meter = EnergyMeter("0000:1b:00.0", nvml=nvml)
    assert meter.clock_mhz() == 1755
    nvml.MHz = 0
    assert meter.clock_mhz() is None
    assert EnergyMeter(None).clock_mhz() is None


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "pynvml) is not installed" in EnergyMeter("0000:1b:00.0").why


def test_ratios_need_a_round_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        Rounds((Sample(1, 1),), {"a": (1.0, 1.0, 1.0)}).ratios("a")
