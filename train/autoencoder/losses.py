"""What the autoencoder is trained for: the losses of a picture and of its latent, and their sum with a discriminator's.

sana-tiny's, whose ideas are the defaults: L1 on pixels, on differences of neighbouring pixels (edges) and on halved and quartered
pictures. Besides, every latent channel is drawn to mean 0 and standard deviation 1 and away from correlation with the others:
flow matching spends itself on the widest channels otherwise, and DC-AE has one scaling factor for all of them. Half of the
latents get noise before they are decoded, since what a sampler delivers is never exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.autoencoder.discriminator import discriminator_loss, generator_loss
from train.autoencoder.settings import LossSettings
from train.objective.place import Place

__all__ = ["AutoencoderObjective", "covariance_penalties", "picture_losses"]

Perceptual = Callable[[Tensor, Tensor], Tensor]


def picture_losses(got: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Mean absolute errors of pixels, edges and coarser copies; fp32. got, wanted: (B, 3, H, W)."""
    error = got.float() - wanted
    return {
        "l1": error.abs().mean(),
        "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        "coarse": F.avg_pool2d(error, 2).abs().mean() + F.avg_pool2d(error, 4).abs().mean(),
    }


def covariance_penalties(latent: Tensor) -> dict[str, Tensor]:
    """How far the channels are from mean 0 and deviation 1 (spread), and from no correlation; fp32. latent: (B, C, h, w)."""
    flat_NC = latent.float().movedim(1, -1).flatten(0, -2)
    mean_C = flat_NC.mean(0)
    centred_NC = flat_NC - mean_C
    with torch.autocast(latent.device.type, enabled=False):
        covariance_CC = centred_NC.mT @ centred_NC / len(flat_NC)
    variance_C = covariance_CC.diagonal()
    off_CC = covariance_CC - torch.diag_embed(variance_C)
    spread_C = ((variance_C + 1e-6).sqrt() - 1).square() + mean_C.square()
    return {"spread": spread_C.mean(), "decorrelate": off_CC.square().sum(0).mean() / latent.shape[1]}


class AutoencoderObjective:
    """The loss of an AutoencoderTask on {"pictures": (B, 3, H, W) fp32, -1 to 1}, and its parts, not yet weighted, by name.

    perceptual: a distance of two batches of pictures, on their device; needed if its weight is above 0. px_per_latent,
    latent_channels: of the autoencoder.
    """

    def __init__(
        self, settings: LossSettings, *, latent_channels: int, px_per_latent: int, perceptual: Perceptual | None = None
    ) -> None:
        self.settings, self.perceptual = settings, perceptual
        self.latent_channels, self.px_per_latent = latent_channels, px_per_latent

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        wanted, weights = batch["pictures"], self.settings
        made = model(wanted, self._noise(wanted, place))
        parts = picture_losses(made.pictures, wanted) | covariance_penalties(made.latent)
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(made.pictures, wanted)
        loss = sum((getattr(weights, name) * part for name, part in parts.items()), torch.zeros((), device=wanted.device))
        if made.scores is not None:
            # Before its start both count nothing, and still take part: DDP waits for the gradient of every parameter.
            on = float(place.step >= weights.adversarial.start)
            generator, discriminator = generator_loss(made.scores.made), discriminator_loss(made.scores.real, made.scores.detached)
            loss = loss + on * (weights.adversarial.weight * generator + discriminator)
            parts |= {"generator": generator, "discriminator": discriminator}
        return {"loss": loss, **parts}

    def _noise(self, pictures: Tensor, place: Place) -> Tensor | None:
        """What is added to the latents: (B, C, h, w) fp32, of another standard deviation for each picture. None if never any."""
        if self.settings.noise == 0:
            return None
        num, device = len(pictures), pictures.device
        generator = torch.Generator(device).manual_seed(place.hashed("noise on latents"))
        level = self.settings.noise * (2 * torch.rand(num, 1, 1, 1, device=device, generator=generator) - 1).clamp(min=0)
        shape = (num, self.latent_channels, pictures.shape[2] // self.px_per_latent, pictures.shape[3] // self.px_per_latent)
        return level * torch.randn(shape, device=device, generator=generator)
