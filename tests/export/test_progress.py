import io
import time

import numpy as np
import pytest
from rich.console import Console

from export.progress import Pace, Progress, peak_memory_bytes, reset_peak_memory


def test_a_line_for_each_stage_with_time_and_peak_memory(monkeypatch):
    clock = iter([5.0, 5.11, 6.0, 6.0, 7.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    sink = io.StringIO()
    progress = Progress(Console(file=sink, width=200))
    with progress.stage("first") as stage:
        stage.note("2 files")
    with progress.stage("second") as stage:
        stage.cached = True
    with pytest.raises(ValueError, match="no"), progress.stage("third"):
        raise ValueError("no")
    first, second, third = sink.getvalue().splitlines()
    assert first.split()[:4] == ["first", "0.1", "s", "peak"]
    assert first.endswith("2 files")
    assert second.split(maxsplit=1) == ["second", "unchanged, nothing done"]
    assert third.startswith("third") and "failed after" in third  # noqa: PT018
    assert [stage.name for stage in progress.stages] == ["first", "second"]


def test_how_long_the_rest_takes_is_said_once_if_it_is_long(monkeypatch):
    clock = iter([0.0, 30.0, 100.0, 200.0, 0.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    sink = io.StringIO()
    pace = Pace(Progress(Console(file=sink, width=200)), "runs")
    for left in (8, 7):
        with pace.piece(left):
            pass
    with Pace(pace.progress, "quick ones").piece(8):
        pass
    assert sink.getvalue().splitlines() == ["  runs: 30 s each, about 4 min for the 8 that are left"]


@pytest.mark.slow
def test_peak_memory_is_of_the_stage_alone():
    if not reset_peak_memory():
        pytest.skip("this system has no high-water mark that can be reset")
    before = peak_memory_bytes()
    array = np.ones(200_000_000, np.uint8)
    assert peak_memory_bytes() - before > 150e6
    del array
    reset_peak_memory()
    assert peak_memory_bytes() - before < 100e6
