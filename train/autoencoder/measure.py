"""How well an autoencoder gives pictures back, and what its latents are like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sana_ref.autoencoder import AutoencoderDC
from train.autoencoder.pictures import FileSource, SceneSource, make_source
from train.autoencoder.settings import FileSettings, SceneSettings
from train.parallel.processes import Processes

__all__ = ["held_out", "measure", "psnr"]

SEED = 2**61  # away from the pictures that are trained on
NOISE = 0.1  # standard deviation, in units of the latents'


def held_out(
    settings: FileSettings | SceneSettings, num: int, *, micro_batch: int, device: torch.device, num_workers: int = 0
) -> list[Tensor]:
    """At least `num` pictures that training does not draw, in batches (B, 3, H, W): other scenes, or other crops of the files."""
    changed: dict[str, Any] = {"seed": settings.seed ^ SEED}
    if isinstance(settings, SceneSettings):
        changed["num_scenes"] = min(settings.num_scenes, num)
    source: FileSource | SceneSource = make_source(
        settings.model_copy(update=changed),
        micro_batch=min(num, micro_batch),
        processes=Processes(device=device),
        num_workers=num_workers,
    )
    batches: list[Tensor] = []
    for batch in source:
        batches.append(batch["pictures"].to(device))
        if sum(map(len, batches)) >= num:
            break
    return batches


def psnr(got: Tensor, wanted: Tensor) -> Tensor:
    """(B,) dB: of each picture (B, 3, H, W), -1 to 1; `got` is clamped to that."""
    error = (got.float().clamp(-1, 1) - wanted).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


@torch.no_grad()
def measure(vae: AutoencoderDC, batches: Iterable[Tensor]) -> dict[str, Any]:
    """PSNR in dB, of latents as they are and with a little noise; SSIM; mean and deviation of all latents and of each channel.

    batches: of pictures (B, 3, H, W) fp32, -1 to 1, at least one; sizes may differ from batch to batch.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    dtype = next(vae.parameters()).dtype
    plain, noisy, alike, latents = [], [], [], []
    for number, wanted in enumerate(batches):
        latent = vae.encode(wanted.to(dtype))
        got = vae.decode(latent).float().clamp(-1, 1)
        generator = torch.Generator(wanted.device).manual_seed(number)
        noise = torch.randn(latent.shape, generator=generator, device=wanted.device) * latent.float().std()
        plain.append(psnr(got, wanted))
        noisy.append(psnr(vae.decode(latent + (NOISE * noise).to(dtype)), wanted))
        score = ssim(got, wanted, data_range=(-1.0, 1.0), reduction="none")
        assert isinstance(score, Tensor)  # no pictures of it were asked for
        alike.append(score)
        latents.append(latent.float().movedim(1, 0).flatten(1))
    every_CN = torch.cat(latents, dim=1)
    return {
        "num_pictures": sum(map(len, plain)),
        "psnr_db": torch.cat(plain).mean().item(),
        f"psnr_noise_{NOISE}_db": torch.cat(noisy).mean().item(),
        "ssim": torch.cat([each.reshape(-1) for each in alike]).mean().item(),
        "latent_mean": every_CN.mean().item(),
        "latent_std": every_CN.std().item(),
        "channel_mean": [round(value, 4) for value in every_CN.mean(1).tolist()],
        "channel_std": [round(value, 4) for value in every_CN.std(1).tolist()],
    }
