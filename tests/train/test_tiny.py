"""The whole program at a minuscule size: train, hand over, lay out, load again here and with diffusers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.tiny import __main__ as tiny
from train.tiny.export_tiny import lay_out
from train.tiny.models import make_text_encoder, make_transformer, make_vae

SIZES = tiny.Sizes(scenes=24, captions=2, ae_scenes=8, ae_batch=2, batch=4, decoded=4, single_questions=4, other_questions=2)


@pytest.fixture(scope="module")
def delivered(sprite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SMOKE", SIZES)
        common = ["--sprites", str(sprite_file), "--work", str(folder / "work"), "--steps", "1", "--smoke"]
        # Two invocations, as on a machine that is lent for a while.
        tiny.main([*common, "--out", str(folder / "first"), "--stages", "ae,latents,text"])
        assert (folder / "first/vae.safetensors").is_file()  # what is done is handed over early
        tiny.main([*common, "--out", str(folder / "out"), "--stages", "ae,latents,text,dit,recogniser", "--finish"])
    return folder / "out"


def test_every_part_is_handed_over(delivered: Path) -> None:
    parts = {"vae.safetensors", "transformer.safetensors", "text_encoder.safetensors", "recogniser.safetensors", "tiny.json"}
    assert {path.name for path in delivered.iterdir()} == parts | {"grid_vae.png", "grid_256.png", "grid_320x192.png"}


def test_laid_out_model_loads(delivered: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
    from transformers import Gemma2Model, PreTrainedTokenizerFast

    lay_out(delivered, tmp_path, note="One more thing.")
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("vae", "transformer", "text_encoder")}
    weights = {name: load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("vae", "transformer")}
    weights["text_encoder"] = load_file(tmp_path / "text_encoder/model.safetensors")
    assert {name: next(iter(part.values())).dtype for name, part in weights.items()} == {
        "vae": torch.bfloat16,
        "transformer": torch.float16,
        "text_encoder": torch.bfloat16,
    }
    ours = {"vae": make_vae, "transformer": make_transformer, "text_encoder": make_text_encoder}
    models = {}
    for name, make in ours.items():
        models[name] = make(configs[name])
        models[name].load_state_dict(weights[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = AutoencoderDC.from_pretrained(tmp_path / "vae")
        transformer = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer").float()
        encoder = Gemma2Model.from_pretrained(tmp_path / "text_encoder").float()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
        scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.flow_shift == 2.0
    torch.manual_seed(0)
    latent = torch.randn(1, 32, 3, 2)
    ids = torch.tensor([tokenizer("a cat on a blue background")["input_ids"]])
    with torch.no_grad():
        text = models["text_encoder"](ids, torch.ones_like(ids))
        torch.testing.assert_close(text, encoder(ids)[0], atol=1e-4, rtol=1e-4)
        time_ = torch.tensor([500.0])
        torch.testing.assert_close(
            models["transformer"](latent, text, time_), transformer(latent, text, time_, return_dict=False)[0], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            models["vae"].decode(latent), vae.float().decode(latent, return_dict=False)[0], atol=1e-3, rtol=1e-3
        )
    card = (tmp_path / "README.md").read_text()
    assert "SIL Open Font License" in card
    assert "One more thing." in card
    assert "{" not in card


def test_sigterm_saves_and_exits_with_zero(sprite_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "train.tiny",
        "--sprites",
        str(sprite_file),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
        "--smoke",
        "--stages",
        "ae",
        "--ae-seconds",
        "1000",
        "--until-seconds",
        "1000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    for line in process.stdout:  # the first line is written after the handler was installed
        if "parameters" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "stopped as asked" in rest
    state = torch.load(tmp_path / "work/ae.pt", weights_only=True)
    assert state["step"] >= 1
