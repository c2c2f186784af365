"""A training run from its configuration: data prepared with sana-tiny, trained, stopped, gone on with."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_sets import sample_files, write_folder

from sana_ref import checkpoint as checkpoints
from sana_ref.variants import VARIANTS
from train import run
from train.data import __main__ as data_program
from train.schema import load
from train.trainer import checkpoint

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"
EXPERIMENT = """\
# @package _global_
name: small
model:
  variant: null
  transformer: {config}
  checkpoint: {checkpoint}
objective:
  caption_dropout: 0.5
trainer:
  steps: 2
  batch: 2
  micro_batch: 1
  ema_decay: 0.9
  checkpoint_steps: 100
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a few pictures, and an experiment that trains sana-tiny's transformer on it."""
    root = tmp_path_factory.mktemp("run")
    write_folder(root / "data", sample_files(6))
    arguments = ["prepare", str(root / "data"), "--model", str(MODEL), "--out", str(root / "caches"), "--resolution", "512"]
    assert data_program.main(arguments) == 0
    known = json.loads((MODEL / "transformer" / "config.json").read_text())
    config = json.dumps({name: value for name, value in known.items() if not name.startswith("_")})
    (root / "configs" / "experiment").mkdir(parents=True)
    (root / "configs" / "experiment" / "small.yaml").write_text(EXPERIMENT.format(config=config, checkpoint=MODEL))
    return root


def command(folder: Path, out: Path, *more: str) -> list[str]:
    (cache,) = (folder / "caches").iterdir()
    settings = [
        f"data.cache={cache}",
        f"env.out={out}",
        "env=ci",
        "optimizer=adamw",
        "trainer.steps=2",
        "trainer.batch=2",
        "trainer.micro_batch=1",
        "trainer.tensorboard=false",
    ]
    return ["experiment=small", "--config-dir", str(folder / "configs"), *settings, "trainer.checkpoint_steps=100", *more]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = checkpoint.latest(out / "small")
    assert newest is not None
    return load_file(newest / "model.safetensors")


@pytest.mark.slow
def test_a_run_that_is_extended_ends_where_one_that_was_not_does(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert run.main(command(folder, tmp_path / "straight")) == 0
    half = command(folder, tmp_path / "twice", "trainer.steps=1")
    assert run.main(half) == 0
    assert run.main(command(folder, tmp_path / "twice")) == 2  # another number of steps is another configuration
    assert run.main([*command(folder, tmp_path / "twice"), "--allow-changes"]) == 0
    straight, twice = weights(tmp_path / "straight"), weights(tmp_path / "twice")
    assert straight.keys() == twice.keys()
    assert all(torch.equal(straight[name], twice[name]) for name in straight)
    before = checkpoints.load(MODEL).transformer(torch.float32, "cpu").state_dict()
    assert any(not torch.equal(before[name], straight[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.btach=3", "batch"),
        ("data.cache=null", "got null; expected the folder that `sana data prepare` named"),
        ("data.cache=/nowhere", "/nowhere"),
        ("parallel.strategy=ddp", "got ddp and one process; expected several, which torchrun starts"),
        ("model.transformer.num_layers=3", "a transformer with"),
    ],
)
def test_what_cannot_be_trained_is_said(
    folder: Path, tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command(folder, tmp_path, change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_a_cache_of_another_size_or_of_other_encoders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(command(folder, tmp_path / "size", "trainer.steps=1")) == 0
    assert "data.cache has pictures of 512 px, and data.resolution is 1024" in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    new_weights = ["model.checkpoint=null", "data.resolution=512", "trainer.steps=1"]
    assert run.main(command(folder, tmp_path / "new", *new_weights, f"validation.model={MODEL}")) == 0
    assert "warning" not in capsys.readouterr().out
    assert run.main(command(folder, tmp_path / "stale", *new_weights, f"validation.model={other}")) == 2
    assert "vae" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_another_size_are_begun_with(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the 2K and 4K experiments do with those of 1024 px: positions are no weights."""
    positions = ["model.transformer.interpolation_scale=2.0", "model.transformer.sample_size=32", "trainer.steps=1"]
    assert run.main(command(folder, tmp_path, *positions)) == 0
    assert "interpolation_scale" in capsys.readouterr().out
    start = VARIANTS["sana_1600m_1024px"].transformer
    for name in ("sana_1600m_2kpx", "sana_1600m_4kpx"):
        assert load(name).model.checkpoint == "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
        wanted = VARIANTS[name].transformer
        assert replace(start, sample_size=wanted.sample_size, interpolation_scale=wanted.interpolation_scale) == wanted


def test_an_experiment_must_be_named() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit, match="2"):
        run.main(["trainer.steps=3"])
    assert "experiment=NAME" in said.getvalue()
