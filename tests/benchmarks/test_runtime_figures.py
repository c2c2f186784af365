"""What the runtime adds to its engines, on a fake GPU: the host's time of a step, launches of a picture, and the record."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_tensorrt import FakeCuda, fake_backend
from fakes import write_fake_bundle

from benchmarks import runtime_figures
from benchmarks.runtime_figures import host_per_step, launches
from engines.spec import Target
from runtime import SanaEngine
from runtime.progress import StepBar

OPTIONS = SimpleNamespace(steps=4, side=64)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SanaEngine]:
    bundle = write_fake_bundle(tmp_path / "fake", targets=(Target.SM89,))
    monkeypatch.setattr("runtime.engine.make_backend", lambda *_, **__: (fake_backend(bundle), "a test"))
    monkeypatch.setattr(FakeCuda, "seconds", lambda self, first, second: 0.0)  # the fake GPU's work is the host's, for once
    with SanaEngine(bundle, progress=False) as made:
        yield made


@pytest.mark.slow
def test_a_planted_wait_in_each_step_is_the_hosts(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ms in each, and 20 in each picture, which is no step's."""
    monkeypatch.setattr(runtime_figures, "ROUNDS", 5)
    before = host_per_step(engine, OPTIONS)
    advance, generate = StepBar.advance, engine.generate

    def slow_step(bar: StepBar) -> None:
        time.sleep(0.003)
        advance(bar)

    def slow_picture(*arguments: object, **more: object) -> object:
        time.sleep(0.02)
        return generate(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(StepBar, "advance", slow_step)
    monkeypatch.setattr(engine, "generate", slow_picture)
    assert host_per_step(engine, OPTIONS) - before == pytest.approx(3.0, abs=1.5)


def test_a_picture_of_a_known_text_is_one_launch(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_figures, "Cuda", FakeCuda)
    words = {"steps": OPTIONS.steps, "width": OPTIONS.side, "height": OPTIONS.side}
    for _ in range(2):
        engine.generate("a cat", **words)
    assert launches(engine, OPTIONS, "a cat") == (1, 0)
    graphs, engines = launches(engine, OPTIONS, "another")
    assert graphs + engines == 2  # and its text's


MEASURED = {"open_s": 1.0, "start_s": 3.0, "picture_s": 2.0, "peak_gb": 10.0}  # what other processes answer
QUICK = ["launches_per_picture 1", "kernels_per_step 273", "host_per_step_ms 0.03"]


@pytest.fixture
def recorded(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What main records, of a bundle on the fake GPU."""
    lines: list[str] = []
    monkeypatch.setattr(runtime_figures, "record", lambda name, value, *_, **__: lines.append(f"{name} {value:g}"))
    monkeypatch.setattr(runtime_figures, "SanaEngine", lambda *_, **__: engine)
    monkeypatch.setattr(runtime_figures, "Cuda", FakeCuda)
    monkeypatch.setattr(runtime_figures, "PROMPT", "cat")  # the fake model reads eight tokens
    monkeypatch.setattr(runtime_figures, "kernels_per_step", lambda *_: 273)  # asks CUDA's driver
    monkeypatch.setattr(runtime_figures, "host_per_step", lambda *_: 0.03)
    monkeypatch.setattr(runtime_figures, "device_info", lambda: SimpleNamespace(capability=(8, 9)))
    monkeypatch.setattr(runtime_figures, "tensorrt", SimpleNamespace(flavor=lambda: "rtx", version=lambda: "1.2.3"))
    monkeypatch.setattr(sys, "argv", ["runtime_figures.py", "bundle", "--name", "fake", "--side", "64", "--steps", "4", "--record"])
    return lines


@pytest.mark.parametrize(
    ("interrupted", "kept"),
    [
        ("start", QUICK),
        ("memory", [*QUICK, "start_fake_s 3"]),
        ("low_memory", [*QUICK, "start_fake_s 3", "peak_fake_64px_fp16_gb 10"]),
    ],
)
def test_an_interrupted_run_keeps_what_it_had(
    interrupted: str, kept: list[str], recorded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def process(mode: str, *_: object) -> dict[str, float]:
        if mode == interrupted:
            raise KeyboardInterrupt
        return MEASURED

    monkeypatch.setattr(runtime_figures, "in_new_process", process)
    with pytest.raises(KeyboardInterrupt):
        runtime_figures.main()
    assert recorded == kept
    printed = capsys.readouterr().out.splitlines()
    assert [" ".join(line.replace(":", "").split()[:2]) for line in printed] == kept
    assert "of a text that is known, 0 engines beside" in printed[0]  # it was captured before it was counted


def test_what_is_measured_now_is_said_before(
    recorded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[tuple[str, list[str]]] = []

    def process(mode: str, *_: object) -> dict[str, float]:
        said.append((mode, [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]))
        return MEASURED

    monkeypatch.setattr(runtime_figures, "in_new_process", process)
    assert runtime_figures.main() == 0
    assert recorded == [*QUICK, "start_fake_s 3", "peak_fake_64px_fp16_gb 10", "peak_fake_64px_low_memory_gb 10"]
    here = [f"runtime_figures: {name}" for name in ("launches_per_picture", "host_per_step_ms", "start_fake_s")]
    assert said == [
        ("start", here),
        ("start", []),
        ("start", []),
        ("memory", ["runtime_figures: peak_fake_64px_fp16_gb"]),
        ("memory", []),
        ("low_memory", ["runtime_figures: peak_fake_64px_low_memory_gb"]),
        ("low_memory", []),
    ]
