"""A model folder under the names of the published ones: first what the transformer's training begins from, then all that ships."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana_ref.transformer import SanaTransformer2DModel
from train.initial import initialise
from train.schema import ModelSettings, transformer_config
from train.tiny.calibration_prompts import calibration_captions
from train.tiny.captions import COLOUR_NAMES, KIND_NAMES, SINGLE
from train.tiny.card import card
from train.tiny.evaluate import held_out_questions
from train.tiny.models import SCHEDULER, TEXT_ENCODERS
from train.tiny.recogniser import RECOGNISER
from train.tiny.sprites import Sprites
from train.tiny.tokenizer import BOS_ID, EOS_ID, INSTRUCTION, PAD_ID, SPECIAL_TOKENS, UNK_ID

__all__ = ["WEIGHT_FILES", "write_card", "write_finished", "write_start"]

WEIGHT_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "vae_lite": "vae_lite/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "recogniser": "recogniser/model.safetensors",
}
VERSION = {"_diffusers_version": "0.42.1"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})


def write_start(
    target: Path, *, vae: Path, text_encoder: Mapping[str, Tensor], size: str, model: ModelSettings, sprites: Sprites, seed: int
) -> None:
    """Autoencoder and text encoder as trained, and a transformer with new weights; whole or not there."""
    part = _part(target)
    shutil.copytree(vae, part / "vae")
    _weights(part / WEIGHT_FILES["text_encoder"], text_encoder, torch.bfloat16)
    write_json(part / "text_encoder/config.json", {**TEXT_ENCODERS[size], "dtype": "bfloat16"})
    _tokenizer(part / "tokenizer", sprites.tokenizer_json, TEXT_ENCODERS[size]["max_position_embeddings"])
    torch.manual_seed(seed)
    _weights(
        part / WEIGHT_FILES["transformer"],
        initialise(SanaTransformer2DModel(transformer_config(model))).state_dict(),
        torch.float32,
    )
    assert model.transformer is not None
    kind = {"_class_name": "SanaTransformer2DModel"}
    write_json(part / "transformer/config.json", {**kind, **model.transformer.model_dump(mode="json"), **VERSION})
    write_json(part / "scheduler/scheduler_config.json", {**SCHEDULER, **VERSION})
    index = {
        "_class_name": "SanaPipeline",
        **VERSION,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
        "complex_human_instruction": list(INSTRUCTION),
        "max_sequence_length": 300,
    }
    write_json(part / "model_index.json", index)
    os.replace(part, target)


def write_finished(
    target: Path,
    *,
    start: Path,
    transformer: Mapping[str, Tensor],
    vae_lite: Path,
    recogniser: Mapping[str, Tensor],
    sprites: Sprites,
) -> None:
    """The trained model with its Lite decoder, its judge and captions kept out; the card comes later. An older one is replaced."""
    part = _part(target)
    shutil.copytree(start, part)
    _weights(part / WEIGHT_FILES["transformer"], transformer, torch.float16)
    shutil.copytree(vae_lite, part / "vae_lite")
    _weights(part / WEIGHT_FILES["recogniser"], recogniser, torch.float16)
    names = sprites.names[: sprites.num_classes]
    classes = {
        **RECOGNISER,
        "classes": sprites.class_names,
        "characters": sprites.characters[: sprites.num_classes],
        "colours": list(COLOUR_NAMES),
    }
    write_json(part / "recogniser/config.json", classes)
    held_out = {
        KIND_NAMES[kind]: [
            {"caption": q.text, "language": q.language, "first": q.scene.first, "second": q.scene.second, "colour": q.scene.colour}
            for q in held_out_questions(kind, 400 if kind == SINGLE else 100, names, seed=9)
        ]
        for kind in range(len(KIND_NAMES))
    }
    write_json(part / "held_out_captions.json", held_out)
    (part / "calibration_prompts.txt").write_text("\n".join(calibration_captions(names)) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def write_card(target: Path, record: Mapping[str, Any]) -> None:
    """metrics.json and README.md; samples.png must be there. record: see card."""
    write_json(target / "metrics.json", record)
    weight_bytes = {name: (target / place).stat().st_size for name, place in WEIGHT_FILES.items()}
    (target / "README.md").write_text(card(record, weight_bytes), encoding="utf-8")


def _part(target: Path) -> Path:
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    return part


def _tokenizer(folder: Path, tokenizer_json: str, longest: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    tokens = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    plain = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        **tokens,
        "added_tokens_decoder": {
            str(index): {"content": token, **plain}
            for token, index in zip(SPECIAL_TOKENS, (PAD_ID, EOS_ID, BOS_ID, UNK_ID), strict=True)
        },
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
