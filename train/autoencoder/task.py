"""The module that is trained: an autoencoder and, in the adversarial phase, its discriminator.

One module, so that one optimizer, one average of the weights and one checkpoint serve both. Their losses are added and meet in one
backward pass, and neither moves the other: the generator's goes through a copy of the discriminator whose weights take no
gradient, the discriminator's sees pictures that lead nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from train.autoencoder.discriminator import PatchDiscriminator
from train.autoencoder.settings import AdversarialSettings, AutoencoderSettings

__all__ = ["AutoencoderTask", "Made", "Scores", "architecture", "trained_parts"]


class Scores(NamedTuple):
    """Of the discriminator: (B, 1, h, w) each. made: for the generator; real, detached: for the discriminator."""

    made: Tensor
    real: Tensor
    detached: Tensor


class Made(NamedTuple):
    """latent: (B, C, h, w), without noise. pictures: (B, 3, H, W)."""

    latent: Tensor
    pictures: Tensor
    scores: Scores | None


class AutoencoderTask(nn.Module):
    """train, head_stages: of AutoencoderSettings; what is not trained takes no gradient."""

    def __init__(
        self,
        config: AutoencoderDCConfig,
        *,
        train: str = "all",
        head_stages: int = 1,
        adversarial: AdversarialSettings | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = AutoencoderDC(config)
        self.autoencoder.requires_grad_(False)
        for part in trained_parts(self.autoencoder, train, head_stages):
            part.requires_grad_(True)
        self.encoder_is_trained = any(p.requires_grad for p in self.autoencoder.encoder.parameters())
        self.discriminator: PatchDiscriminator | None = None
        if adversarial is not None and adversarial.weight > 0:
            self.discriminator = PatchDiscriminator(width=adversarial.width, num_layers=adversarial.num_layers)

    def forward(self, pictures: Tensor, noise: Tensor | None = None) -> Made:
        """pictures: (B, 3, H, W), -1 to 1. noise: what is added to the latents, or None."""
        if pictures.is_cuda:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            latent = self.autoencoder.encode(pictures)
        decoded = self.autoencoder.decode(latent if noise is None else latent + noise.to(latent.dtype))
        return Made(latent, decoded, self._scores(pictures, decoded))

    def _scores(self, real: Tensor, made: Tensor) -> Scores | None:
        if self.discriminator is None:
            return None
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        real_and_made = self.discriminator(torch.cat([real, made.detach().to(real.dtype)]))
        return Scores(functional_call(self.discriminator, still, made), *real_and_made.chunk(2))


def architecture(settings: AutoencoderSettings) -> AutoencoderDCConfig:
    """The config that `settings` names. Raises SpecError for one that does not fit together."""
    from sana_ref.variants import DC_AE, DC_AE_LITE

    if settings.architecture is not None:
        return AutoencoderDCConfig(**settings.architecture.model_dump())
    return {"dc_ae": DC_AE, "dc_ae_lite": DC_AE_LITE}[str(settings.variant)]


def trained_parts(vae: AutoencoderDC, train: str, head_stages: int) -> list[nn.Module]:
    """Source of middle and head: DC-AE, arXiv:2410.10733, section 3.3 and figure 6."""
    encoder, decoder = vae.encoder, vae.decoder
    if train == "all":
        return [vae]
    if train == "decoder":
        return [decoder]
    if train == "middle":
        return [encoder.down_blocks[-1], encoder.conv_out, decoder.conv_in, decoder.up_blocks[-1]]
    assert train == "head", train
    finest = [stage for stage in decoder.up_blocks if len(list(stage.children()))][:head_stages]
    return [*finest, decoder.norm_out, decoder.conv_out]
