"""Autoencoders in vae folders of diffusers' layout: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.build import build
from sana_ref.tensors import find_weights, read_json
from train.trainer.errors import TrainingError

__all__ = ["load_vae", "read_config", "refuse_another", "save_vae"]

STEM = "diffusion_pytorch_model"


def read_config(folder: Path) -> AutoencoderDCConfig:
    """Raises CheckpointError if there is none, SpecError for one that is not supported."""
    return AutoencoderDCConfig.from_json(read_json(folder / "config.json"))


def load_vae(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AutoencoderDC:
    """In evaluation mode. Raises CheckpointError or SpecError for a folder that does not hold an autoencoder whole."""
    config = read_config(folder)
    source, _ = find_weights(folder, STEM, None)
    return build(lambda: AutoencoderDC(config), source, str(folder), dtype, device)


def refuse_another(key: str, folder: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises TrainingError, naming the first tensor that differs in name or shape from what is trained."""
    for name in sorted({*weights, *expected}):
        got, wanted = (tuple(each[name].shape) if name in each else None for each in (weights, expected))
        if got != wanted:
            raise TrainingError(
                f"autoencoder.{key}: got {folder}, whose {name} has shape {got}; expected {wanted}. Choose that folder's "
                "architecture (autoencoder=… on the command line), or another folder."
            )


def save_vae(vae: AutoencoderDC, out: Path, *, scaling_factor: float, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the folder `out`, whole or not at all. Raises TrainingError if it is there already."""
    if out.exists():
        raise TrainingError(f"{out}: is there already; expected a new folder. Name another one, or remove it.")
    writing = out.with_name(f".{out.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    config = {"_class_name": "AutoencoderDC", **asdict(vae.config), "scaling_factor": scaling_factor}
    (writing / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, writing / f"{STEM}.safetensors", metadata={"format": "pt"})
    os.replace(writing, out)
