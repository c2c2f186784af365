"""A build that is killed leaves the old bundle or the new one, and the next build finishes what it began."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_build import cache, quiet, request, tiny

from engines.bundle import Bundle
from export.build import build

# Each starts processes that build. Among the quick tests, a bundle and a cache entry are killed at every step: tests/engines.
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# A process that has imported what a build needs, which takes longer than the build. For each line that it reads it forks one that
# builds, says its id, and then how it ended. That one sends itself SIGKILL at the begin or the end of stage `at`, if it is told to.
SERVER = """
import json, os, signal, sys
import export.build, export.settings, export.quantization_request
from export import progress
from export.build_engine import main
real = progress.Progress.stage
def build(which, at, arguments):
    entered = left = 0
    class Killing:
        def __init__(self, manager): self.manager = manager
        def __enter__(self):
            nonlocal entered
            stage = self.manager.__enter__()
            if which == "begin" and entered == at: os.kill(os.getpid(), signal.SIGKILL)
            entered += 1
            return stage
        def __exit__(self, *error):
            nonlocal left
            self.manager.__exit__(*error)
            if which == "end" and left == at: os.kill(os.getpid(), signal.SIGKILL)
            left += 1
    progress.Progress.stage = lambda self, name: Killing(real(self, name))
    return main(arguments)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 99
        try:
            code = build(*json.loads(line))
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STAGES = 15  # read; export, reference, parity of four; quality; write


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory) -> tuple[Path, Path, str, str]:
    """A bundle, another checkpoint whose bundle takes its place, and the digests of both bundles."""
    folder = tmp_path_factory.mktemp("kills")
    other = folder / "other"
    shutil.copytree(tiny(), other)
    weights = load_file(other / "transformer/diffusion_pytorch_model.safetensors")
    weights["proj_out.bias"] += 0.25
    save_file(weights, other / "transformer/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    old = build(request(folder / "old"), quiet()).bundle
    new = build(request(folder / "new", model=other), quiet()).bundle
    return old.path, other, old.digest, new.digest


class Builds:
    """Processes that build, one at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def start(self, model: Path, out: Path, cache: Path, which: str = "never", at: int = 0) -> int:
        """The process's id."""
        arguments = ["--model", str(model), "--target", "onnx", "--out", str(out), "--cache", str(cache)]
        print(json.dumps([which, at, arguments]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        """The exit code; -n after signal n."""
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes, text=True, env=environment) as server:
        yield Builds(server)


def cache_of_exports(folder: Path) -> Path:
    """The shared cache in a place of its own, and in it only exports, which take long: all else runs again."""
    for entry in cache().glob("??/*"):
        if list(entry.glob("files/*.onnx")):
            shutil.copytree(entry, folder / "cache" / entry.parent.name / entry.name)
    return folder / "cache"


def check(out: Path, old: str, new: str, model: Path, cache: Path) -> str:
    """Old or new, whole; and a build that runs to its end gives the new one, and leaves nothing else behind."""
    found = Bundle.open(out).digest
    assert found in (old, new)
    assert build(request(out, model=model, cache=cache), quiet()).bundle.digest == new
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return found


BOUNDARIES = [("begin", STAGES - 1), ("end", STAGES - 1), ("begin", 1), ("begin", 5), ("begin", 6), ("begin", 9), ("end", 13)]


@pytest.mark.parametrize(("which", "at"), BOUNDARIES)
def test_killed_at_a_stage_boundary(old_and_new, builds, tmp_path, which, at):
    old_path, model, old, new = old_and_new
    out, own = tmp_path / "bundle", cache_of_exports(tmp_path)
    shutil.copytree(old_path, out)
    builds.start(model, out, own, which, at)
    assert builds.wait() == -signal.SIGKILL
    assert check(out, old, new, model, own) == (new if (which, at) == ("end", STAGES - 1) else old)


def test_killed_at_random_moments(old_and_new, builds, tmp_path):
    old_path, model, old, new = old_and_new
    own = cache_of_exports(tmp_path)
    out = tmp_path / "bundle"
    shutil.copytree(old_path, out)
    begin = time.monotonic()
    builds.start(model, out, own)
    assert builds.wait() == 0
    lasts = time.monotonic() - begin
    moments = random.Random(0)
    for _ in range(4):
        shutil.rmtree(out)
        shutil.copytree(old_path, out)
        shutil.rmtree(own)
        cache_of_exports(tmp_path)  # else the first build would have left nothing to do
        child = builds.start(model, out, own)
        time.sleep(lasts * moments.uniform(0.0, 1.0))
        with contextlib.suppress(ProcessLookupError):  # it was faster this time
            os.kill(child, signal.SIGKILL)
        assert builds.wait() in (0, -signal.SIGKILL)
        check(out, old, new, model, own)
