"""For all tests."""

import os
from pathlib import Path

import cpp_build
import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported. Tensors are small: threads would wait for each other, and for seconds where something else runs too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests look at what the plugins in Python keep; those of the library in C++ name it.
os.environ.setdefault("SANA_PLUGINS", "python")

# Time says more about the machine than about the code: on a busy one an example may take seconds.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def cpp(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the C++ programs: SANA_CPP_BUILD, or one that goes with the run."""
    if kept := os.environ.get("SANA_CPP_BUILD"):
        return cpp_build.build(Path(kept))
    base = tmp_path_factory.getbasetemp()
    return cpp_build.build((base if worker_id == "master" else base.parent) / "cpp")
