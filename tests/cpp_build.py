"""Builds runtime/cpp once for all tests of a run, and talks to its test program."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "runtime" / "cpp"


def build(folder: Path, *targets: str, source: Path = SOURCE, sanitize: str = "") -> Path:
    """`folder` with the programs in it. Skips where a tool or a package is missing; fails where the code does not compile.

    targets: what of it to build; all of it unless given. sanitize: "thread", or "address,undefined".
    """
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install cmake g++ libssl-dev zlib1g-dev")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:  # workers of one run share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        # -Og and all files at once: compiles in half the time, and rounds the same
        options = ["-DSANA_TESTS=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-Og", "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"]
        options += [f"-DSANA_SANITIZE={sanitize}"]
        configured = subprocess.run(["cmake", "-S", source, "-B", folder, *options], capture_output=True, text=True, check=False)
        if configured.returncode:
            if "Could NOT find" in configured.stderr:
                missing = next(line for line in configured.stderr.splitlines() if "Could NOT find" in line)
                pytest.skip(f"{missing.strip()}: apt-get install libssl-dev zlib1g-dev")
            pytest.fail(configured.stderr)
        if sanitize:
            skip_without_sanitizer(sanitize)
        command = ["cmake", "--build", folder, "-j1", *(["--target", *targets] if targets else [])]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            pytest.fail(built.stdout[-4000:] + built.stderr[-4000:])
    return folder


def skip_without_sanitizer(sanitize: str) -> None:
    command = ["c++", f"-fsanitize={sanitize}", "-x", "c++", "-", "-o", "/dev/null"]
    tried = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the compiler has no -fsanitize={sanitize}: {tried.stderr[-200:]}")


def ask(program: Path, requests: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """(word, body) of each request to (kind, body) of its answer. kind: "ok", or an error's class, with its message as the body."""
    sent = b"".join(f"{word} {len(body)}\n".encode() + body for word, body in requests)
    done = subprocess.run([program], input=sent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    answers, at, out = [], 0, done.stdout
    while at < len(out):
        end = out.index(b"\n", at)
        kind, size = out[at:end].split()
        at = end + 1 + int(size)
        answers.append((kind.decode(), out[end + 1 : at]))
    return answers
