"""DDP and FSDP2 on two processes and Gloo: the losses of one, runs that go on as another number, and what goes wrong on one."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from data_sets import FakeEncoders, sample_files, write_folder

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.data.cache import Writer
from train.data.settings import DataSettings
from train.data.source import find
from train.parallel.processes import Processes

WORKER = Path(parallel_worker.__file__)
ROOT = WORKER.parents[1]
CONFIG = SanaTransformerConfig(
    in_channels=3,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=2,
)
EXPERIMENT = """\
# @package _global_
name: small
model:
  variant: null
  transformer: {config}
data:
  cache: {cache}
objective:
  caption_dropout: 0.3
trainer:
  folder: {root}/unnamed
  steps: 4
  batch: 8
  micro_batch: 2
  clip: 1.0
  ema_decay: 0.9
  precision: fp32
  activation_checkpointing: false
  checkpoint_steps: 100
  tensorboard: false
"""
COMMON = ["env=ci", "optimizer=adamw", "trainer.optimizer.lr=0.003", "trainer.schedule.warm_up_steps=0", "trainer.precision=fp32"]
COMMON += ["trainer.steps=4", "trainer.batch=8", "trainer.micro_batch=2", "trainer.checkpoint_steps=100"]


def options(root: Path, folder: str, strategy: str, *more: str, **others: Any) -> dict[str, Any]:
    overrides = [*COMMON, f"parallel.strategy={strategy}", f"trainer.folder={root / folder}", *more]
    return {"configs": str(root / "configs"), "overrides": overrides, **others}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]


def on_two(root: Path, **phases: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What each process found, by the phase's name."""
    (root / "phases.json").write_text(json.dumps(phases))
    command = torchrun(str(WORKER), str(root / "phases.json"), str(root))
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((root / f"{name}.json").read_text()) for name in phases}


def alone(**phase: Any) -> dict[str, Any]:
    found = parallel_worker.train(phase, Processes(device=torch.device("cpu")))
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    settings = DataSettings.checked(path=write_folder(root / "data", sample_files(9)))
    cache = Writer(find(settings), FakeEncoders(), settings, root / "caches").write()
    (root / "configs" / "experiment").mkdir(parents=True)
    text = EXPERIMENT.format(config=json.dumps(asdict(CONFIG)), cache=cache, root=root)
    (root / "configs" / "experiment" / "small.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Any]:
    return alone(**options(root, "single", "single", validated=True))


@pytest.fixture(scope="module")
def two(root: Path) -> dict[str, list[dict[str, Any]]]:
    bf16 = ("trainer.precision=bf16", "trainer.steps=2")
    first = alone(**options(root, "run", "single", stop=1))
    found = on_two(
        root,
        ddp=options(root, "ddp", "ddp", validated=True),
        fsdp2=options(root, "fsdp2", "fsdp2", "trainer.activation_checkpointing=true", validated=True),
        ddp_bf16=options(root, "ddp_bf16", "ddp", *bf16),
        fsdp2_bf16=options(root, "fsdp2_bf16", "fsdp2", "trainer.activation_checkpointing=true", *bf16),
        auto=options(root, "auto", "auto", "trainer.steps=1"),
        second=options(root, "run", "fsdp2", stop=2, process=1),
        third=options(root, "run", "ddp", stop=3),
        fourth=options(root, "run", "fsdp2"),
        poison=options(root, "poison", "fsdp2", poison=2, process=1),
        full=options(root, "full", "fsdp2", "trainer.checkpoint_steps=1", break_save=True, process=1),
    )
    return found | {"first": [first]}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(single: dict, two: dict, strategy: str) -> None:
    first, second = two[strategy]
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert len(set(single["losses"].values())) == 4
    assert (first["sharded"] > 0) == (strategy == "fsdp2")
    assert second["log"] == []


def validations(lines: list[str]) -> list[list[float]]:
    return [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in lines if ": validation " in line]


@pytest.mark.slow
def test_validation_sees_the_whole_average_by_the_models_names(single: dict, two: dict) -> None:
    expected = validations(single["log"])
    assert len(expected) == 2
    for strategy in ("ddp", "fsdp2"):
        found = validations(two[strategy][0]["log"])
        assert [value for row in found for value in row] == pytest.approx([v for row in expected for v in row], rel=1e-4)
    assert f"tensors {len(SanaTransformer2DModel(CONFIG).state_dict())}.0000" in next(
        line for line in single["log"] if ": validation " in line
    )


@pytest.mark.slow
def test_bf16_shards_are_as_good_as_autocast(single: dict, two: dict) -> None:
    for strategy in ("ddp_bf16", "fsdp2_bf16"):
        for step in ("1", "2"):
            assert two[strategy][0]["losses"][step] == pytest.approx(single["losses"][step], rel=2e-2)


@pytest.mark.slow
def test_a_run_that_fits_is_replicated_and_says_why(two: dict) -> None:
    assert two["auto"][0]["sharded"] == 0
    assert two["auto"][0]["log"][0].startswith("ddp on 2 GPUs of")


@pytest.mark.slow
def test_a_run_goes_on_as_another_number_and_another_strategy(root: Path, single: dict, two: dict) -> None:
    """One process, then two shares, stopped by the second process; two copies; two shares again; one process."""
    assert [found["counts"] for found in two["second"]] == [[2, 2, 0]] * 2  # the first one was not asked to stop
    assert not any(found["done"] for found in two["second"])
    losses = two["first"][0]["losses"] | two["second"][0]["losses"] | two["third"][0]["losses"] | two["fourth"][0]["losses"]
    assert list(losses) == ["1", "2", "3", "4"]
    assert losses == pytest.approx(single["losses"], rel=1e-5)
    shares, whole = sorted(path for path in (root / "run").iterdir() if path.name.startswith("step"))[::-1]
    assert ((shares / ".metadata").is_file(), (whole / "model.safetensors").is_file()) == (True, True)
    more = {"allow_changes": True}
    last, longer = (alone(**options(root, name, "single", "trainer.steps=5", **more)) for name in ("run", "single"))
    assert last["losses"]["5"] == pytest.approx(longer["losses"]["5"], rel=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_is_skipped_by_both(two: dict) -> None:
    for found in two["poison"]:
        assert found["counts"] == [4, 3, 1]
        assert [math.isfinite(loss) for loss in found["losses"].values()] == [True, False, True, True]


@pytest.mark.slow
def test_a_full_disk_on_one_ends_both_and_leaves_the_last_good_checkpoint(root: Path, two: dict) -> None:
    for found in two["full"]:
        assert re.search(r"step_00000002: .*No space left on device.*last good one stays: .*step_00000001", found["error"])
    assert [path.name for path in (root / "full").iterdir()] == ["step_00000001"]
    again = alone(**options(root, "full", "single", stop=2, allow_changes=True))
    assert list(again["losses"]) == ["2"]


def test_a_batch_that_two_cannot_share_is_refused(root: Path) -> None:
    from train import tasks
    from train.trainer.errors import TrainingError

    given = options(root, "uneven", "auto", "trainer.batch=6")
    settings, make_trainer = tasks.load("small", given["overrides"], given["configs"])
    with pytest.raises(TrainingError, match=r"batch: got 6, which 2 processes.*multiple of 4. Use 4 or 8"):
        make_trainer(settings, processes=Processes(device=torch.device("cpu"), world_size=2))


@pytest.mark.slow
def test_sigterm_to_one_process_saves_on_both_and_ends_with_zero(root: Path) -> None:
    given = options(root, "sigterm", "fsdp2", "trainer.steps=100000", "trainer.log_steps=1")
    command = torchrun("-m", "train.run", "experiment=small", "--config-dir", given["configs"], *given["overrides"])
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    assert started.stdout is not None
    try:
        while not (line := started.stdout.readline()).startswith("step 2/"):
            assert line, started.communicate()[1][-4000:]
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(max(map(int, children)), signal.SIGTERM)
        out, err = started.communicate(timeout=240)
    finally:
        started.kill()
    assert started.returncode == 0, err[-4000:]
    assert "stopped and saved" in out
    (saved,) = (path for path in (root / "sigterm").iterdir() if path.is_dir())
    assert f"saved {saved}" in out
