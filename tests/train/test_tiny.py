"""The whole program at a minuscule size: five experiments, a stop on the way, a model folder that loads here and with diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sana_ref.checkpoint import load
from train.data.reading import Cache
from train.tiny import __main__ as tiny
from train.tiny.caption_cache import captions_of
from train.tiny.layout import WEIGHT_FILES
from train.tiny.models import FLOW_SHIFT, SCHEDULER
from train.tiny.settings import ScenesSettings
from train.tiny.sprites import Sprites
from train.tiny.table import TableSource
from train.trainer.errors import TrainingError

TRAINER = """
trainer:
  steps: 2
  batch: 4
  micro_batch: 4
  precision: fp32
  compile: false
  activation_checkpointing: false
  ema_decay: 0.9
  tensorboard: false
"""
ARCHITECTURE = """
autoencoder:
  architecture:
    encoder_block_out_channels: [8, 8, 8, 8, 32, 32]
    decoder_block_out_channels: [8, 8, 8, 8, 32, 32]
    encoder_layers_per_block: [0, 1, 1, 1, 1, 1]
    decoder_layers_per_block: [0, 1, 1, 1, 1, 1]
pictures:
  sizes: [[64, 64], [96, 64]]
  weights: [0.5, 0.5]
  num_scenes: 8
validation: {every: 1, num_pictures: 4}
"""
EXPERIMENTS = {
    "sana_tiny_dcae": "task: autoencoder\ndefaults: [override /autoencoder: sana_tiny, override /pictures: scenes, _self_]"
    + ARCHITECTURE,
    "sana_tiny_dcae_lite": "task: autoencoder\n"
    "defaults: [override /autoencoder: sana_tiny_lite, override /pictures: scenes, _self_]" + ARCHITECTURE,
    "sana_tiny_text": """task: scene_text
size: minuscule
scenes: {nums: [16, 2], sizes: [[64, 64], [96, 64]], captions: 2, length: 64, seed: 100}""",
    "sana_tiny_recogniser": "task: scene_recogniser\nside: 64\ndecoded: 4",
    "sana_tiny": """defaults: [override /model: sana_tiny, override /optimizer: adamw, _self_]
model:
  transformer: {num_attention_heads: 2, num_layers: 2, num_cross_attention_heads: 2, cross_attention_dim: 64, caption_channels: 32}
data: {resolution: 512, max_sequence_length: 64}""",
}


@pytest.fixture(scope="module")
def folders(sprite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    configs, work = tmp_path_factory.mktemp("configs"), tmp_path_factory.mktemp("work")
    (configs / "experiment").mkdir()
    for name, text in EXPERIMENTS.items():
        path = configs / f"experiment/{name}.yaml"
        path.write_text(f"# @package _global_\n{text}\nname: {name}\nparallel: {{strategy: single}}\n{TRAINER}", encoding="utf-8")
    arguments = ["--sprites", str(sprite_file), "--work", str(work), "--config-dir", str(configs), "--questions", "2"]
    return work, arguments


@pytest.fixture(scope="module")
def model(folders: tuple[Path, list[str]]) -> Path:
    work, arguments = folders
    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("SAMPLES", 8), ("NUM_PICTURES", 16), ("NUM_SINGLE", 60)):  # of what is measured, which learnt nothing
            patch.setattr(tiny, name, few)
        # As on a machine that is lent for a while: what is done is kept, and the next invocation goes on from there.
        with patch.context() as stopped:
            stopped.setattr(tiny, "cache", lambda training: (_ for _ in ()).throw(tiny.Stopped("sana_tiny_text")))
            assert tiny.main(arguments) == 0
        before = (work / "vae/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
        assert not (work / "sana-tiny").exists()
        assert tiny.main(arguments) == 0
        assert (work / "vae/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    return work / "sana-tiny"


@pytest.mark.slow
def test_model_has_its_parts_and_a_card(model: Path) -> None:
    there = {path.relative_to(model).as_posix() for path in model.rglob("*.safetensors")}
    assert there == set(WEIGHT_FILES.values())
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "python -m train.tiny" in card
    assert "not measured" not in card.lower()
    metrics = json.loads((model / "metrics.json").read_text())
    assert set(metrics["seconds"]) >= {*EXPERIMENTS, "scenes encoded", "pictures judged"}
    assert metrics["pictures_seen"] == 8
    dtypes = {name: {tensor.dtype for tensor in load_file(model / place).values()} for name, place in WEIGHT_FILES.items()}
    bf16, fp16 = {torch.bfloat16}, {torch.float16}
    assert dtypes == {"vae": bf16, "vae_lite": bf16, "text_encoder": bf16, "transformer": fp16, "recogniser": fp16}


@pytest.mark.slow
def test_lite_has_the_full_ones_encoder_and_factor(model: Path) -> None:
    full, lite = (load_file(model / WEIGHT_FILES[name]) for name in ("vae", "vae_lite"))
    encoder = [name for name in full if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(full[name], lite[name]) for name in encoder)
    factors = {json.loads((model / name / "config.json").read_text())["scaling_factor"] for name in ("vae", "vae_lite")}
    assert len(factors) == 1


@pytest.mark.slow
def test_model_loads_with_diffusers_too(model: Path) -> None:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
    from transformers import Gemma2Model, PreTrainedTokenizerFast

    checkpoint = load(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = AutoencoderDC.from_pretrained(model / "vae_lite")
        transformer = SanaTransformer2DModel.from_pretrained(model / "transformer").float()
        encoder = Gemma2Model.from_pretrained(model / "text_encoder").float()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model / "tokenizer")
        scheduler = DPMSolverMultistepScheduler.from_pretrained(model / "scheduler")
    assert scheduler.config.flow_shift == FLOW_SHIFT
    assert vae.config.latent_channels == 32
    torch.manual_seed(0)
    latents, time = torch.randn(1, 32, 3, 2), torch.tensor([500.0])
    ids = torch.tensor([tokenizer("a cat on a blue background")["input_ids"]])
    with torch.no_grad():
        text = checkpoint.text_encoder(torch.float32)(ids, torch.ones_like(ids))
        torch.testing.assert_close(text, encoder(ids)[0], atol=1e-4, rtol=1e-4)
        ours = checkpoint.transformer(torch.float32)(latents, text, time)
        torch.testing.assert_close(ours, transformer(latents, text, time, return_dict=False)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_cache_holds_every_scene_as_its_encoders_see_it(model: Path, folders: tuple[Path, list[str]]) -> None:
    (folder,) = (folders[0] / "cache").iterdir()
    cache = Cache(folder)
    assert len(cache) == 16 + 2
    assert {(entry.width, entry.height) for entry in cache.entries} == {(64, 64), (96, 64)}
    batch = cache.batch([0, 1], length=64, passes=[0, 0], seed=0, temperature=1.0)
    checkpoint = load(model)
    from runtime.prompt import PromptTokenizer
    from sana_ref.components import TextEncoderForExport

    tokens = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt).encode([cache.captions(0)[batch.chosen[0]]])
    encoder = TextEncoderForExport(checkpoint.text_encoder(torch.float32), checkpoint.prompt.max_sequence_length)
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask))[0]
    length = int(tokens.selected_mask.sum())
    assert int(batch.mask[0].sum()) == length
    torch.testing.assert_close(batch.text[0, :length].float(), wanted[:length], atol=0.05, rtol=0.02)  # kept in bf16


def test_schedule_of_the_model_is_that_of_its_training() -> None:
    from train.schema import load as load_experiment

    settings = load_experiment("sana_tiny")
    assert settings.objective.flow_shift == settings.schedule.flow_shift == FLOW_SHIFT == SCHEDULER["flow_shift"]


@pytest.mark.slow
def test_captions_are_made_once_for_their_settings(sprite_file: Path, sprites: Sprites, tmp_path: Path) -> None:
    settings = ScenesSettings(sprites=sprite_file, nums=(9, 1), sizes=((64, 64), (96, 64)), captions=2, length=64, seed=3)
    said: list[str] = []
    path = captions_of(settings, tmp_path, log=said.append)
    assert captions_of(settings, tmp_path, log=said.append) == path
    assert len(said) == 1
    with np.load(path) as arrays:
        assert {name: arrays[name].shape[:1] for name in arrays} == {
            "64x64 ids": (9,), "64x64 facts": (9,), "96x64 ids": (1,), "96x64 facts": (1,),
        }  # fmt: skip
    assert captions_of(settings.model_copy(update={"seed": 4}), tmp_path, log=said.append) != path


def test_table_goes_on_where_it_was_and_refuses_another() -> None:
    def make(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"rows": torch.rand(3, generator=generator)}

    whole = TableSource(make, seed=1, what="a")
    stream = iter(whole)
    first = [next(stream)["rows"] for _ in range(2)]
    again = TableSource(make, seed=1, what="a")
    again.load_state_dict(whole.state_dict())
    assert torch.equal(next(iter(again))["rows"], next(stream)["rows"])
    assert not torch.equal(*first)
    with pytest.raises(TrainingError, match="expected one in 'b'"):
        TableSource(make, seed=1, what="b").load_state_dict(whole.state_dict())
