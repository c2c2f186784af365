"""What a run becomes: a vae folder in diffusers' layout, with the averaged weights and a measured scaling factor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from train.autoencoder.measure import held_out, measure
from train.autoencoder.run import make_task
from train.autoencoder.settings import AutoencoderExperiment
from train.autoencoder.weights import read_config, save_vae
from train.trainer import checkpoint
from train.trainer.errors import TrainingCheckpointError

__all__ = ["export", "settings_of"]

HERE = {  # in the place of sections that a checkpoint does not keep
    "env": {"name": "local", "data": ".", "out": ".", "num_workers": 0},
    "parallel": {},
    "validation": {},
}


def settings_of(run: Path) -> AutoencoderExperiment:
    """The settings that a run's newest checkpoint keeps. Raises TrainingCheckpointError if it is no autoencoder's."""
    path = _latest(run)
    try:
        config = json.loads((path / "state.json").read_text(encoding="utf-8"))["config"]
        text = json.dumps(config | HERE | {"trainer": config["trainer"] | {"folder": str(run)}})
        return AutoencoderExperiment.model_validate_json(text, strict=True)
    except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's are ValueErrors
        raise TrainingCheckpointError(
            f"{path}: got settings that are not those of an autoencoder's run ({str(error).splitlines()[0]}). "
            "Name the folder of a run with task: autoencoder."
        ) from None


def export(
    run: AutoencoderExperiment | Path,
    out: Path,
    *,
    num_pictures: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the newest checkpoint of `run`, its settings or its folder, as the vae folder `out`.

    The averaged weights, if the run has an average. scaling_factor: 1 / the standard deviation of the latents of `num_pictures`
    held-out pictures, so that the transformer sees unit variance. Where the encoder is frozen, the latents are those of the folder
    that it is from, and so is the factor: one transformer serves both.
    Returns what `measure` found, of the weights as they are stored. Raises TrainingCheckpointError, TrainingError for an `out` that
    exists, CheckpointError if a frozen encoder's folder is gone.
    """
    settings = settings_of(run) if isinstance(run, Path) else run
    path = _latest(settings.trainer.folder)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = make_task(settings, start=False)
    try:
        weights = load_file(path / "model.safetensors")
        if (path / "ema.safetensors").exists():
            weights |= load_file(path / "ema.safetensors")
        task.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingCheckpointError(
            f"{path}: cannot be read as this run's ({str(error).splitlines()[0]}). Use another one, or the run's own settings."
        ) from None
    vae = task.autoencoder.eval().requires_grad_(False).to(device, dtype)
    pictures = held_out(settings.pictures, num_pictures, micro_batch=settings.trainer.micro_batch, device=device)
    found = measure(vae, pictures)
    chosen = settings.autoencoder
    frozen_from = None if task.encoder_is_trained else chosen.encoder_from or chosen.checkpoint
    factor = round(1 / found["latent_std"], 5) if frozen_from is None else read_config(frozen_from).scaling_factor
    save_vae(vae, out, scaling_factor=factor, dtype=dtype)
    log(f"{out}: from {path.name}; PSNR {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.4f}, scaling factor {factor}")
    return found


def _latest(run: Path) -> Path:
    path = checkpoint.latest(run)
    if path is None:
        raise TrainingCheckpointError(f"{run}: got no checkpoint; expected the folder of a run, with folders step_NNNNNNNN.")
    return path
