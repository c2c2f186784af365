"""DDP and FSDP2 on Gloo: the same losses as one process, and checkpoints that change the number of processes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import parallel_worker
import pytest
import torch
from safetensors.torch import load_file, save_file

from train.parallel import checkpoint
from train.parallel.__main__ import main as convert
from train.parallel.wrap import per_process

WORKER = Path(parallel_worker.__file__)
ROOT = WORKER.parents[1]


def run(processes: int, out: Path, **options: object) -> dict:
    """Start the worker as torchrun does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(WORKER)]
    arguments = json.dumps(options | {"out": str(out)}, default=str)
    done = subprocess.run([*command, arguments], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of six steps in one process."""
    return run(1, tmp_path_factory.mktemp("alone") / "out.json", strategy="single", steps=[0, 6])["losses"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one_and_resume_as_another_number(
    tmp_path: Path, alone: list[float], strategy: str
) -> None:
    half = tmp_path / "half"
    first = run(2, tmp_path / "a.json", strategy=strategy, steps=[0, 3], save_to=half, asynchronous=strategy == "fsdp2")
    assert first["losses"] == pytest.approx(alone[:3], rel=1e-5)
    assert (first["sharded"] > 0) == (strategy == "fsdp2")
    assert not half.with_name("half.part").exists()
    other = "fsdp2" if strategy == "ddp" else "single"  # saved by one strategy, continued by another
    second = run(1 if other == "single" else 2, tmp_path / "b.json", strategy=other, steps=[3, 6], resume=half)
    assert second["losses"] == pytest.approx(alone[3:], rel=1e-5)
    assert len(set(alone)) == len(alone)


def test_one_file_and_back(tmp_path: Path) -> None:
    model = parallel_worker.make_model()
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    checkpoint.to_dcp(file, parallel_worker.make_model(), tmp_path / "dcp")
    target = parallel_worker.make_model()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    checkpoint.to_safetensors(tmp_path / "dcp", target, tmp_path / "out" / "model.safetensors")
    back, there = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], there[name]) for name in back)


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    weights = parallel_worker.make_model().state_dict()
    weights["proj_out.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"proj_out.bias.*got shape \(5,\); the model has \(4,\)"):
        checkpoint.to_dcp(tmp_path / "weights.safetensors", parallel_worker.make_model(), tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parallel_worker.make_model()
    checkpoint.save(tmp_path / "last", model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "last").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "last", model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "last").iterdir()} == before


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got no distributed checkpoint"):
        checkpoint.load(tmp_path, parallel_worker.make_model())


def test_a_batch_that_cannot_be_dealt_out() -> None:
    assert per_process(64, 8, 2) == 4
    with pytest.raises(ValueError, match=r"got 30 for 8 processes x 2 micro-batches; expected a multiple of 16.*The next is 32"):
        per_process(30, 8, 2)


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = parallel_worker.make_model()
    checkpoint.save(tmp_path / "step_3", model)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(asdict(model.config)))
    assert convert(["convert", str(tmp_path / "step_3"), str(tmp_path / "transformer"), "--config", str(config)]) == 0
    assert convert(["convert", str(tmp_path / "transformer"), str(tmp_path / "again")]) == 0
    target = parallel_worker.make_model()
    with torch.no_grad():
        target.proj_out.weight.zero_()
    checkpoint.load(tmp_path / "again", target)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), model.parameters(), strict=True))

    assert convert(["convert", str(tmp_path / "transformer"), str(tmp_path / "again")]) == 2
    assert "Nothing is overwritten" in capsys.readouterr().err
    assert convert(["convert", str(tmp_path / "step_3"), str(tmp_path / "other")]) == 2
    assert "got no transformer config" in capsys.readouterr().err
    assert convert(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "got neither a distributed checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
