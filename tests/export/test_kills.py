"""A build that is killed leaves the old bundle or the new one, and the next build finishes what it began."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_build import cache, quiet, request, tiny

from engines.bundle import Bundle
from export.build import build

# Each starts processes that build. Among the quick tests, a bundle and a cache entry are killed at every step: tests/engines.
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# Sends itself SIGKILL at the begin or the end of stage number `at` (of what `which` says), then builds.
DRIVER = """
import os, signal, sys
from export import progress
from export.build_engine import main
which, at = sys.argv[1], int(sys.argv[2])
entered = left = 0
real = progress.Progress.stage
class Killing:
    def __init__(self, manager): self.manager = manager
    def __enter__(self):
        global entered
        stage = self.manager.__enter__()
        if which == "begin" and entered == at: os.kill(os.getpid(), signal.SIGKILL)
        entered += 1
        return stage
    def __exit__(self, *error):
        global left
        self.manager.__exit__(*error)
        if which == "end" and left == at: os.kill(os.getpid(), signal.SIGKILL)
        left += 1
progress.Progress.stage = lambda self, name: Killing(real(self, name))
sys.exit(main(sys.argv[3:]))
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


def start(driver: list[str], model: Path, out: Path, cache: Path) -> subprocess.Popen[bytes]:
    options = ["--model", str(model), "--target", "onnx", "--out", str(out), "--cache", str(cache)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *driver, *options], stderr=subprocess.DEVNULL, env=environment)


def cache_of_exports(folder: Path) -> Path:
    """The shared cache in a place of its own, and in it only exports, which take long: all else runs again."""
    shutil.copytree(cache(), folder / "cache")
    for entry in (folder / "cache").glob("??/*"):
        if not list(entry.glob("files/*.onnx")):
            shutil.rmtree(entry)
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
def test_killed_at_a_stage_boundary(old_and_new, tmp_path, which, at):
    old_path, model, old, new = old_and_new
    out, own = tmp_path / "bundle", cache_of_exports(tmp_path)
    shutil.copytree(old_path, out)
    child = start(["-c", DRIVER, which, str(at)], model, out, own)
    assert child.wait(timeout=120) == -signal.SIGKILL
    assert check(out, old, new, model, own) == (new if (which, at) == ("end", STAGES - 1) else old)


def test_killed_at_random_moments(old_and_new, tmp_path):
    old_path, model, old, new = old_and_new
    own = cache_of_exports(tmp_path)
    begin = time.monotonic()
    out = tmp_path / "bundle"
    shutil.copytree(old_path, out)
    assert start(["-m", "export.build_engine"], model, out, own).wait(timeout=120) == 0
    lasts = time.monotonic() - begin
    moments = random.Random(0)
    for _ in range(6):
        shutil.rmtree(out)
        shutil.copytree(old_path, out)
        shutil.rmtree(own)
        cache_of_exports(tmp_path)  # else the first build would have left nothing to do
        child = start(["-m", "export.build_engine"], model, out, own)
        time.sleep(lasts * moments.uniform(0.3, 1.0))  # before that it only imports
        child.kill()
        child.wait(timeout=30)
        check(out, old, new, model, own)
