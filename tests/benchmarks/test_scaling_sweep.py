"""The sweep over sizes: what it times, its exponents, what it leaves out, its file and its part of the page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from latency_records import record

from benchmarks import latency, scaling_sweep
from benchmarks.latency_history import History
from benchmarks.latency_timing import Sample
from engines.errors import ManifestError, SpecError


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Times that grow as they should: tokens n cost n, n and n * n microseconds. What was called is in the list."""
    called: list[str] = []

    def tasks(side: int, heads: int, device: str, dtype: torch.dtype) -> dict:
        tokens = (side // 32) ** 2
        costs = {"linear": tokens, "quadratic": tokens**2, "block": 10 * tokens}
        return {name: lambda name=name, cost=cost: called.append(f"{name} {cost / 1000}") for name, cost in costs.items()}

    def watch(call: object) -> Sample:
        call()
        ms = float(called[-1].split()[1])
        return Sample(ms, ms)

    monkeypatch.setattr(scaling_sweep, "tasks", tasks)
    monkeypatch.setattr(scaling_sweep, "cpu_clock", watch)
    return called


def test_exponents(planted: list[str]) -> None:
    found = scaling_sweep.sweep([512, 1024, 2048, 8192], heads=2, device="cpu", repeats=2)
    assert found.exponent("linear") == pytest.approx(1)
    assert found.exponent("block") == pytest.approx(1)
    assert found.exponent("quadratic") == pytest.approx(2)


def test_what_would_take_too_long_is_not_run(planted: list[str]) -> None:
    found = scaling_sweep.sweep([512, 1024, 2048], heads=2, device="cpu", limit_s=2)  # expected of softmax at 2048 px: 16.8 s
    assert found.ms["quadratic"] == (pytest.approx(65.536), pytest.approx(1048.576), None)
    assert None not in found.ms["linear"]
    assert scaling_sweep.sweep([512], heads=2, device="cpu").exponent("linear") is None


def test_the_page_has_it(planted: list[str], tmp_path: Path) -> None:
    out, report = tmp_path / "scaling_sweep.json", tmp_path / "page.html"
    assert scaling_sweep.main(["--sides", "512,1024,2048", "--device", "cpu", "--out", str(out)]) == 0
    assert scaling_sweep.read(out) is not None
    History(tmp_path).append([record()])
    assert latency.main(["--history", str(tmp_path), "--report", str(report)]) == 0
    text = report.read_text()
    assert "softmax attention: pixels to the power of 2.00" in text
    ET.fromstring(text[text.rindex("<svg") : text.rindex("</svg>") + 6])
    out.unlink()
    assert latency.main(["--history", str(tmp_path), "--report", str(report)]) == 0
    assert "benchmarks/scaling_sweep.py was not run" in report.read_text()
    out.write_text('{"sides": [1]}')
    with pytest.raises(ManifestError):
        scaling_sweep.read(out)


@pytest.mark.parametrize("sides", [[512, 512], [1024, 512], [500]])
def test_sides_grow(sides: list[int]) -> None:
    with pytest.raises(SpecError, match="expected growing multiples of 32 px"):
        scaling_sweep.sweep(sides, heads=2, device="cpu")


def test_bad_sides_on_the_command_line() -> None:
    assert scaling_sweep.main(["--sides", "500"]) == 2


@torch.inference_mode()
def test_the_real_work_runs() -> None:
    made = scaling_sweep.tasks(64, 4, "cpu", torch.float32)
    assert made.keys() == scaling_sweep.NAMES.keys()
    assert made["linear"]().shape == made["quadratic"]().shape == (1, 4, 4, 32)
    assert made["block"]().shape == (1, 32, 2, 2)
