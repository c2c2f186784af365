"""What is random in a training step, and the loss.

    x_t = (1 - t) x0 + t noise,   target = noise - x0,   the model's time is 1000 t

Everything random is a function of the place in the run (train.objective.place), never of what was drawn before: a resumed run
draws what the uninterrupted one would have drawn, with no generator's state to keep. Times and dropped captions are drawn on the
CPU, noise on the model's device, where millions of numbers cost nothing.

A caption is dropped by masking all of it but its first token. Gemma-2 is causal and begins every text with <bos>, so that this is
the encoding of the empty prompt, which guidance compares with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.objective.place import Place
from train.objective.settings import ObjectiveSettings
from train.objective.timesteps import loss_weight, quantile, shift

__all__ = ["Draw", "FlowObjective", "draw", "flow_loss"]

NUM_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Draw:
    """t: (B,) fp32, shifted. noise: (B, C, h, w) fp32. keep: (B,) bool, false where the caption is dropped."""

    t: Tensor
    noise: Tensor
    keep: Tensor


def draw(settings: ObjectiveSettings, shape: tuple[int, ...], place: Place, device: torch.device | str = "cpu") -> Draw:
    """For a micro-batch of latents of `shape`, (B, C, h, w); on `device`."""
    generator = torch.Generator().manual_seed(place.hashed())
    u = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    keep = torch.rand(shape[0], generator=generator) >= settings.caption_dropout
    t = shift(quantile(settings.timesteps, u), settings.flow_shift).float()
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(place.hashed("noise")), device=device)
    return Draw(t=t.to(device, non_blocking=True), noise=noise, keep=keep.to(device, non_blocking=True))


def flow_loss(
    model: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], batch: Mapping[str, Tensor], drawn: Draw, settings: ObjectiveSettings
) -> Tensor:
    """The mean loss of a micro-batch, a scalar in fp32.

    batch: latents (B, 32, h, w), times the scaling factor; prompt_embeds (B, L, C); prompt_mask (B, L), 1 for text. All of them and
    `drawn` are on the model's device. model: velocity of (latents, text, timestep, mask).
    """
    x0, t = batch["latents"].float(), drawn.t
    wide = t[:, None, None, None]
    mask = batch["prompt_mask"]
    mask = torch.cat([mask[:, :1], mask[:, 1:] * drawn.keep[:, None].to(mask.dtype)], dim=1)
    velocity = model((1 - wide) * x0 + wide * drawn.noise, batch["prompt_embeds"].float(), t * NUM_TIMESTEPS, mask)
    error = (velocity.float() - (drawn.noise - x0)).square().flatten(1).mean(1)
    return (loss_weight(settings, t) * error).mean()


class FlowObjective:
    """flow_loss of what is drawn for a place: an objective as the trainer takes it."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    def __call__(self, model: Callable[..., Tensor], batch: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        latents = batch["latents"]
        drawn = draw(self.settings, tuple(latents.shape), place, latents.device)
        return {"loss": flow_loss(model, batch, drawn, self.settings)}
