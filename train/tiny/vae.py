"""Training the autoencoder on composed scenes.

Loss: L1 on pixels, on differences of neighbouring pixels (edges) and on halved and quartered pictures. Besides, every latent
channel is drawn to mean 0 and standard deviation 1 and away from correlation with the others: flow matching spends itself on
the widest channels otherwise, and DC-AE has one scaling factor for all of them. Half of the latents get noise before they are
decoded, since what a sampler delivers is never exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_ref.autoencoder import AutoencoderDC
from train.tiny.flat import FlatParameters
from train.tiny.scenes import SceneTensors, compose, draw_scenes, palette

NOISE = 0.15  # largest standard deviation of the noise on latents of unit variance
REGULARISE = 0.02
DECORRELATE = 0.02


@dataclass(frozen=True, kw_only=True)
class SceneSource:
    """Pictures on demand: a table of scenes on the device for every bucket, drawn once; rows are picked at random."""

    sprites: Tensor
    colours: Tensor
    tables: dict[str, SceneTensors]
    sizes: dict[str, tuple[int, int]]  # width, height in px

    @classmethod
    def of(cls, sprites: Tensor, sizes: dict[str, tuple[int, int]], *, num: int, seed: int) -> SceneSource:
        tables = {
            name: SceneTensors.of(
                draw_scenes(num, seed=seed + index, num_objects=len(sprites), aspect=width / height), sprites.device
            )
            for index, (name, (width, height)) in enumerate(sizes.items())
        }
        return cls(sprites=sprites, colours=palette(sprites.device), tables=tables, sizes=sizes)

    def pictures(self, bucket: str, rows: Tensor | slice) -> Tensor:
        """(n, 3, H, W) fp32, -1 to 1."""
        width, height = self.sizes[bucket]
        return compose(self.tables[bucket][rows], self.sprites, width=width, height=height, colours=self.colours)

    def draw(self, bucket: str, num: int) -> Tensor:
        table = self.tables[bucket]
        return self.pictures(bucket, torch.randint(len(table.colour), (num,), device=self.sprites.device))


def picture_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of pixels, edges and coarser copies; fp32."""
    error = got.float() - wanted
    loss = error.abs().mean() + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    for factor in (2, 4):
        loss = loss + 0.25 * F.avg_pool2d(error, factor).abs().mean()
    return loss


def latent_penalty(latent: Tensor) -> Tensor:
    """How far the channels are from mean 0, deviation 1 and no correlation; fp32. latent: (B, C, h, w)."""
    flat_NC = latent.float().movedim(1, -1).flatten(0, -2)
    mean = flat_NC.mean(0)
    centred = flat_NC - mean
    covariance = centred.mT @ centred / len(flat_NC)
    variance = covariance.diagonal()
    off = covariance - torch.diag_embed(variance)
    spread = ((variance + 1e-6).sqrt() - 1).square() + mean.square()
    return REGULARISE * spread.mean() + DECORRELATE * off.square().sum(0).mean() / latent.shape[1]


def make_step(
    vae: AutoencoderDC, flat: FlatParameters, source: SceneSource, bucket: str, batch: int, stats: Tensor
) -> Callable[[], None]:
    """One training step on `batch` new pictures of a bucket. stats: (5,), sums of loss, norm, 1, pixel L1, latent penalty."""
    dtype = flat.working.dtype

    def step() -> None:
        with torch.no_grad():
            wanted = source.draw(bucket, batch)
            level = NOISE * (2 * torch.rand(batch, 1, 1, 1, device=wanted.device) - 1).clamp(min=0)
        latent = vae.encode(wanted.to(dtype, memory_format=torch.channels_last))
        noisy = latent + (level * torch.randn_like(latent, dtype=torch.float32)).to(dtype)
        got = vae.decode(noisy)
        penalty = latent_penalty(latent)
        loss = picture_loss(got, wanted) + penalty
        norm = flat.step_with(loss)
        with torch.no_grad():
            l1 = (got.detach().float() - wanted).abs().mean()
            stats.add_(torch.stack([loss.detach(), norm, torch.ones_like(norm), l1, penalty.detach()]).nan_to_num(0.0, 0.0, 0.0))

    return step


@torch.no_grad()
def measure(vae: AutoencoderDC, source: SceneSource, bucket: str, *, num: int, batch: int, dtype: torch.dtype) -> dict[str, object]:
    """PSNR (dB, of pictures clamped to their range) with and without noise on the latents, and the latents' statistics."""
    errors, noisy_errors, latents = [], [], []
    generator = torch.Generator(source.sprites.device).manual_seed(0)
    for start in range(0, num, batch):
        wanted = source.pictures(bucket, slice(start, start + batch))
        latent = vae.encode(wanted.to(dtype, memory_format=torch.channels_last))
        noise = torch.randn(latent.shape, generator=generator, device=latent.device)
        for bag, code in ((errors, latent), (noisy_errors, latent + (0.1 * noise).to(dtype))):
            got = vae.decode(code).float().clamp(-1, 1)
            bag.append((got - wanted).square().mean(dim=(1, 2, 3)))
        latents.append(latent.float())
    every = torch.cat(latents)
    deviations = every.std(dim=(0, 2, 3))

    def psnr(bag: list[Tensor]) -> float:
        return (10 * torch.log10(4 / torch.cat(bag).clamp(min=1e-10))).mean().item()

    return {
        "psnr_db": psnr(errors),
        "psnr_noise_0.1_db": psnr(noisy_errors),
        "latent_std": every.std().item(),
        "channel_std": [round(value, 4) for value in deviations.tolist()],
        "channel_mean": [round(value, 4) for value in every.mean(dim=(0, 2, 3)).tolist()],
    }
