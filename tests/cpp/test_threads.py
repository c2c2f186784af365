"""One C++ engine, many threads: what tests/cpp/threads.cpp checks, under ThreadSanitizer."""

import os
import subprocess
from pathlib import Path

import cpp_build
import pytest
from cpp_bundles import letters_bundle


@pytest.fixture(scope="module")
def program(tmp_path_factory, request) -> Path:
    if "SANA_CPP_SANITIZE" in os.environ:  # another one, which the rest is compiled for
        return request.getfixturevalue("cpp") / "sana_threads"
    folder = Path(os.environ.get("SANA_CPP_BUILD", tmp_path_factory.mktemp("tsan")))
    return cpp_build.build(folder / "thread", "sana_threads", sanitize="thread") / "sana_threads"


@pytest.mark.slow
def test_threads(program, tmp_path):
    done = subprocess.run([program, letters_bundle(tmp_path / "b")], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
