"""The sweep over sizes: what it times, its exponents, what it leaves out, its file and its part of the page."""

from __future__ import annotations

import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from latency_records import record

from benchmarks import latency, scaling_sweep
from benchmarks.latency_history import History
from benchmarks.latency_timing import Sample
from engines.errors import ManifestError, SpecError

ROOT = Path(__file__).parents[2]


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


def test_the_page_has_it(planted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_sweep, "keep_freed_memory", lambda: None)  # of this process, that lives on
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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sides", "500"], "got 500; expected growing multiples of 32 px"),
        (["--sides", "512,big"], "got '512,big'; expected px, such as 512,1024"),
        (["--heads", "0"], "--heads: got 0; expected a number above 0"),
        (["--heads", "-2"], "--heads: got -2; expected a number above 0"),
        (["--repeats", "0"], "--repeats: got 0; expected a number above 0"),
        (["--limit-s", "nan"], "--limit-s: got nan; expected a number above 0"),
        (["--device", "cuda"], "PyTorch sees no GPU; expected cpu"),
        (["--out", "/dev/null/sweep.json"], "--out: got /dev/null/sweep.json, where nothing can be written (Not a directory)"),
        (["--out", "/"], "--out: got /, which is a folder; expected the name of a file in it"),
    ],
)
def test_what_cannot_be_swept_is_said(
    planted: list[str],
    arguments: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scaling_sweep, "keep_freed_memory", lambda: None)
    common = ["--sides", "512", "--device", "cpu", "--out", str(tmp_path / "sweep.json")]
    assert scaling_sweep.main([*common, *arguments]) == 2
    assert why in capsys.readouterr().err
    assert not planted  # nothing was timed
    assert not list(tmp_path.iterdir())


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling_sweep, "sweep", interrupted)
    monkeypatch.setattr(scaling_sweep, "keep_freed_memory", lambda: None)
    assert scaling_sweep.main(["--device", "cpu", "--out", str(tmp_path / "sweep.json")]) == 130
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library's malloc is not glibc's")
def test_freed_memory_is_not_taken_from_the_kernel_again(tmp_path: Path) -> None:
    """Linear attention at 6144 px, with tensors of 38 MB: 46,085 page faults each time without, or 90 where pages have 2 MiB.

    The least of eight samples, and half is enough: now and then glibc leaves a freed block of one tensor unused.
    """
    program = """
import resource, sys, torch
from benchmarks import scaling_sweep
if sys.argv[1:]:
    assert scaling_sweep.main(["--sides", "64", "--heads", "4", "--device", "cpu", "--out", sys.argv[1]]) == 0
def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
with torch.inference_mode():
    call = scaling_sweep.tasks(6144, 8, "cpu", torch.float32)["linear"]
    call()
    print(min(faults(call) for _ in range(8)))
"""

    def least(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1])

    assert least(str(tmp_path / "sweep.json")) < least() / 2


@torch.inference_mode()
def test_the_real_work_runs() -> None:
    made = scaling_sweep.tasks(64, 4, "cpu", torch.float32)
    assert made.keys() == scaling_sweep.NAMES.keys()
    assert made["linear"]().shape == made["quadratic"]().shape == (1, 4, 4, 32)
    assert made["block"]().shape == (1, 32, 2, 2)
