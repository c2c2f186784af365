"""Checkpoints of shares, and a run's checkpoints in diffusers' layout and back."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.parallel import checkpoint
from train.parallel.__main__ import FILE
from train.parallel.__main__ import main as convert

CONFIG = SanaTransformerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    num_layers=1,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=24,
)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(SanaTransformer2DModel(CONFIG).state_dict())


def a_run(folder: Path, weights: dict[str, Tensor], *, sharded: bool, ema: bool = True) -> Path:
    """A checkpoint with an average of twice the weights, of all but one tensor."""
    average = {name: 2 * tensor for name, tensor in weights.items() if name != "proj_out.bias"} if ema else {}
    folder.mkdir()
    if sharded:
        folder.rmdir()
        flat = {f"{kind}.{name}": t for kind, there in (("model", weights), ("ema", average)) for name, t in there.items()}
        checkpoint.save(folder, flat | {"optimizer.0.step": torch.tensor(3.0)})
    else:
        save_file(weights, folder / "model.safetensors")
        if ema:
            save_file(average, folder / "ema.safetensors")
    model = {"variant": None, "transformer": asdict(CONFIG), "checkpoint": None}
    (folder / "state.json").write_text(json.dumps({"config": {"model": model}}))
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shares"])
def test_a_run_in_diffusers_layout(tmp_path: Path, weights: dict[str, Tensor], sharded: bool) -> None:
    step = a_run(tmp_path / "step_00000003", weights, sharded=sharded)
    assert convert(["convert", str(step), str(tmp_path / "average")]) == 0
    assert convert(["convert", str(step), str(tmp_path / "model"), "--weights", "model", "--dtype", "bf16"]) == 0
    found = load_file(tmp_path / "average" / FILE)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor if name == "proj_out.bias" else 2 * tensor)
    found = load_file(tmp_path / "model" / FILE)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights.items())
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["_class_name"] == "SanaTransformer2DModel"
    assert SanaTransformerConfig.from_json(written) == CONFIG


def test_there_and_back(tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    step = a_run(tmp_path / "step_00000003", weights, sharded=True, ema=False)
    assert convert(["convert", str(step), str(tmp_path / "transformer")]) == 0
    assert convert(["convert", str(tmp_path / "transformer"), str(tmp_path / "again")]) == 0
    target = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    checkpoint.load(tmp_path / "again", target)
    assert all(torch.equal(target[f"model.{name}"], tensor) for name, tensor in weights.items())

    capsys.readouterr()
    wrong = [
        ([tmp_path / "transformer", tmp_path / "again"], "Nothing is overwritten"),
        ([tmp_path / "again", tmp_path / "other"], "got no transformer config"),
        ([tmp_path, tmp_path / "other"], "got neither a training checkpoint"),
        ([step, tmp_path / "other", "--weights", "ema"], "got no average"),
    ]
    for arguments, message in wrong:
        assert convert(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_another_models_weights_are_refused(tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    step = a_run(tmp_path / "step", weights | {"proj_out.bias": torch.zeros(5)}, sharded=False)
    assert convert(["convert", str(step), str(tmp_path / "out")]) == 2
    assert "proj_out.bias': got shape (5,); the model has (4,)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_shares", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "last", weights)
    assert not list(tmp_path.iterdir())


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got no distributed checkpoint"):
        checkpoint.shapes(tmp_path)
