"""Tests of this folder once more, with programs compiled for AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import cpp_build
import pytest

HERE = Path(__file__).parent
# Those that run no program compiled here: of the plugins' library, which is compiled as ever, and of what is installed.
WITHOUT = ("test_sanitizers.py", "test_plugins.py", "test_package.py")
SANITIZE = "address,undefined"


@pytest.mark.slow
def test_the_others(tmp_path_factory):
    cpp_build.skip_without_sanitizer(SANITIZE)
    kept = os.environ.get("SANA_CPP_BUILD")
    folder = Path(kept, "address") if kept else tmp_path_factory.mktemp("asan")
    environment = os.environ | {
        "SANA_CPP_BUILD": str(folder),
        "SANA_CPP_SANITIZE": SANITIZE,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", HERE, "-m", "not gpu", "-p", "no:cacheprovider", "-rs"]
    command += [f"--ignore={HERE / name}" for name in WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    for program in ("sana", "sana_check", "sana_threads"):
        assert b"__asan_init" in (folder / program).read_bytes(), program
