"""latency.py with a fake bundle and planted clocks, and the kernels' cases without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import write_fake_bundle
from latency_records import Plant

from benchmarks import latency, latency_session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latency") / "fake"
    write_fake_bundle(out)
    return out


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    found = Plant()
    monkeypatch.setattr(latency_session.Bench, "make", found.make)
    monkeypatch.setattr(latency_session, "has_gpu", lambda: False)
    monkeypatch.setattr(latency, "prepare_torch", lambda gpu, threads: None)
    return found


@pytest.fixture
def program(bundle: Path, tmp_path: Path) -> Callable[..., int]:
    common = ["--bundle", str(bundle), "--history", str(tmp_path / "history"), "--components", "denoiser", "--rounds", "30"]
    return lambda *more: latency.main([*common, *more])


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of kernel_plans.py's cases are shapes without memory."""
    for name in ("kernel_case", "denoiser_cases", "decoder_cases", "text_cases"):
        monkeypatch.setattr(f"benchmarks.{name}.DEVICE", "meta")
