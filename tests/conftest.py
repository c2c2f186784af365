"""For all tests."""

import gc
import os
import shutil
import tempfile
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

# Files that take a minute and more, the longest first: else one process begins a long one when the other has nothing left to do.
LONGEST = (
    "cpp/test_sanitizers.py",
    "export/test_kills.py",
    "export/test_plans.py",
    "export/test_variants.py",
    "export/test_text_w8a8.py",
    "parity/test_engine_and_reference.py",
    "train/test_data_program.py",
    "export/test_stages.py",
    "train/test_parallel.py",
    "export/test_token_table.py",
    "train/test_tiny.py",
    "export/test_variant_recipes.py",
    "engines/test_bundle_writer.py",
    "benchmarks/test_latency_peers.py",
    "benchmarks/test_latency.py",
)
# What these make takes seconds: kernels through an interpreter, programs in C++, graphs, a bundle, a wheel, a trained model. So
# their tests are slow.
SLOW_FIXTURES = frozenset({"interpreted", "cpp", "exported", "built", "installed", "finished"})
SHARED_CACHE = "SANA_TESTS_CACHE"  # of exports: see tiny_build.cache


# The collector walks through all that was imported, again and again, and finds nothing there. Imports come without it.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    if SHARED_CACHE not in os.environ:  # xdist's workers inherit it, and so does a run that a test starts
        os.environ[SHARED_CACHE] = tempfile.mkdtemp(prefix="sana-tests-cache-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED_CACHE), ignore_errors=True))
    os.environ["SANA_CACHE_DIR"] = os.environ[SHARED_CACHE]  # nothing is taken from the user's own cache, or left there


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there by now stays. What tests leave is collected, though less often: exports make millions of objects."""
    gc.collect()
    gc.freeze()
    session.config.add_cleanup(gc.unfreeze)  # else libraries say at the end that it was never freed
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def cpp(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the C++ programs: SANA_CPP_BUILD, or one that goes with the run. SANA_CPP_SANITIZE: as cpp_build.build's."""
    sanitize = os.environ.get("SANA_CPP_SANITIZE", "")
    if kept := os.environ.get("SANA_CPP_BUILD"):
        return cpp_build.build(Path(kept), sanitize=sanitize)
    base = tmp_path_factory.getbasetemp()
    return cpp_build.build((base if worker_id == "master" else base.parent) / "cpp", sanitize=sanitize)
