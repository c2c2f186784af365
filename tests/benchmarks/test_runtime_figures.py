"""What the runtime adds to its engines, on a fake GPU: the host's time of a step, and launches of a picture."""

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
