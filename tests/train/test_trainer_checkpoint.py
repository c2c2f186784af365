"""Checkpoints that are whole or not there, and what a run refuses to resume from."""

import errno
import os
import shutil

import pytest
import torch

from train.trainer import checkpoint
from train.trainer.checkpoint import Snapshot, differences, latest, load, save
from train.trainer.errors import TrainingCheckpointError

CONFIG = {"trainer": {"batch": 8, "betas": (0.9, 0.999)}, "objective": {"flow_shift": 3.0}}


def snapshot(step, *, rows=3):
    model = {"a.weight": torch.full((rows, 2), float(step)), "b.bias": torch.ones(4)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Snapshot(
        step=step,
        updates=step,
        non_finite=0,
        model=model,
        ema={"b.bias": torch.zeros(4)},
        optimizer=optimizer,
        optimizer_kind="adamw",
        data={"epoch": 1},
        config=CONFIG,
    )


def read(path, *, rows=3, config=CONFIG, optimizer_kind="adamw", **more):
    model = snapshot(0, rows=rows).model
    return load(path, model=model, config=config, optimizer_kind=optimizer_kind, with_ema=True, **more)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    there = snapshot(7)
    got = read(save(tmp_path, there, keep=1))
    assert torch.equal(got.model["a.weight"], there.model["a.weight"])
    assert torch.equal(got.ema["b.bias"], there.ema["b.bias"])
    assert got.optimizer == {**got.optimizer, "param_groups": there.optimizer["param_groups"]}
    assert (got.step, got.updates, got.non_finite, got.data) == (7, 7, 0, {"epoch": 1})


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, snapshot(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000009", "step_00000010"]
    assert latest(tmp_path).name == "step_00000010"
    assert latest(tmp_path / "absent") is None


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["weights", "optimizer", "free space"])
def test_no_space_leaves_the_last_good_one(tmp_path, monkeypatch, where):
    good = save(tmp_path, snapshot(1), keep=1)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(checkpoint, "save_file", full)
        elif where == "optimizer":
            patch.setattr(torch, "save", full)
        else:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(TrainingCheckpointError, match=r"could not be written.*last good one stays: .*step_00000001") as caught:
            save(tmp_path, snapshot(2), keep=1)
    assert "No space left" in str(caught.value)
    assert ("and 10 were free" in str(caught.value)) == (where == "free space")
    assert list(tmp_path.iterdir()) == [good]
    assert read(good).step == 1
    assert save(tmp_path, snapshot(2), keep=1).name == "step_00000002"


def test_a_file_that_may_not_grow(tmp_path):
    """A process that may write no more than 64 KiB to a file, with a checkpoint beyond that: what the writers raise themselves."""
    import resource
    import signal

    large = Snapshot(**{**{f: getattr(snapshot(2), f) for f in Snapshot.__dataclass_fields__}, "model": {"a": torch.ones(2**16)}})
    good = save(tmp_path, snapshot(1), keep=1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(TrainingCheckpointError, match="last good one stays"):
            save(tmp_path, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [good]


def test_what_a_kill_left_behind_is_not_a_checkpoint(tmp_path):
    good = save(tmp_path, snapshot(1), keep=1)
    (tmp_path / ".step_00000002.writing").mkdir()
    (tmp_path / ".step_00000002.writing" / "model.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == good
    assert read(save(tmp_path, snapshot(2), keep=1)).step == 2


def test_another_models_checkpoint_is_refused(tmp_path):
    path = save(tmp_path, snapshot(1), keep=1)
    with pytest.raises(TrainingCheckpointError, match=r"a\.weight has shape \(3, 2\); this model's is \(5, 2\)"):
        read(path, rows=5)
    with pytest.raises(TrainingCheckpointError, match=r"another model's: c has shape \(none\); this model's is \(1,\)"):
        load(path, model=snapshot(1).model | {"c": torch.ones(1)}, config=CONFIG, optimizer_kind="adamw", with_ema=True)


def test_another_config_is_refused_unless_told(tmp_path):
    path = save(tmp_path, snapshot(1), keep=1)
    other = {"trainer": {"batch": 16, "betas": (0.9, 0.999)}, "objective": {"weighting": "none"}}
    with pytest.raises(TrainingCheckpointError) as caught:
        read(path, config=other)
    for line in ("trainer.batch: 8 -> 16", "objective.flow_shift: 3.0 -> (none)", "objective.weighting: (none) -> none"):
        assert line in str(caught.value)
    assert "betas" not in str(caught.value)
    assert read(path, config=other, allow_changes=True).step == 1


def test_another_optimizers_state_is_refused_always(tmp_path):
    path = save(tmp_path, snapshot(1), keep=1)
    with pytest.raises(TrainingCheckpointError, match="has the state of adamw; expected came"):
        read(path, optimizer_kind="came", allow_changes=True)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
def test_damaged_files_are_refused(tmp_path, name):
    path = save(tmp_path, snapshot(1), keep=1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingCheckpointError, match="damaged"):
        read(path)


def test_an_optimizer_file_cannot_run_code(tmp_path):
    path = save(tmp_path, snapshot(1), keep=1)
    torch.save({"state": shutil.rmtree}, path / "optimizer.pt")
    with pytest.raises(TrainingCheckpointError, match="damaged"):
        read(path)


def test_differences_are_by_dotted_name():
    assert differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 2, "c": [1]}, "d": 2}) == ["a.b: 1 -> 2"]
