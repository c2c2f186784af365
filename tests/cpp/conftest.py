import os
from collections.abc import Callable
from pathlib import Path

import cpp_build
import pytest

Ask = Callable[..., list[tuple[str, bytes]]]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the C++ programs: SANA_CPP_BUILD, or one that goes with the run."""
    if kept := os.environ.get("SANA_CPP_BUILD"):
        return cpp_build.build(Path(kept))
    base = tmp_path_factory.getbasetemp()
    return cpp_build.build((base if worker_id == "master" else base.parent) / "cpp")


@pytest.fixture(scope="session")
def ask(built: Path) -> Ask:
    return lambda requests: cpp_build.ask(built / "sana_check", requests)
