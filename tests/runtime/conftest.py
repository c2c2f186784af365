"""For tests of the runtime on a GPU that is not there. A file's own fixture of the same name goes first."""

import signal
from pathlib import Path

import pytest
from fake_tensorrt import FakeCuda
from fakes import write_fake_bundle

from engines.bundle import Bundle
from engines.spec import Target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake", targets=[Target.SM89])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the kernels of another one, or of the user."""
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def ctrl_c():
    """A background job inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
