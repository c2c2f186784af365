"""One step of sampling as one module: guidance, network and the sampler's update. It is exported, and the reference runs it.

A sampler is a table of eight numbers a step (runtime/schedule.py), so one module serves every sampler and the compiled graph holds
the whole step. Everything but the network is fp32; the network runs in the type of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sana_ref.config import refuse_unless
from sana_ref.transformer import BlockText, SanaTransformer2DModel

__all__ = ["GUIDANCE_INPUTS", "INPUTS", "OUTPUTS", "DenoiserStep", "guidance_weights"]

INPUTS = ("latents", "previous", "coefficients", "guidance_weights", "text_keys", "text_values", "prompt_mask")
GUIDANCE_INPUTS = ("guidance_scale", "noise")  # further inputs of models with guidance_embeds (Sprint)
OUTPUTS = ("next_latents", "prediction")


class DenoiserStep(nn.Module):
    """x, text and a row of the schedule to the next x.

    v = sum over k of weights[k] * network(c_in x, timestep, keys and values of text[k])
    next = c_x x + c_v v + c_previous previous [+ c_noise noise];  prediction (of the clean latents) = p_x x + p_v v
    """

    def __init__(self, transformer: SanaTransformer2DModel) -> None:
        super().__init__()
        config = transformer.config
        refuse_unless(
            config.num_out_channels == config.in_channels,
            f"out_channels: got {config.num_out_channels}; expected in_channels {config.in_channels}: a step returns what it takes",
        )
        self.transformer = transformer

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of forward's arguments for this model, in order."""
        return INPUTS + (GUIDANCE_INPUTS if self.transformer.config.guidance_embeds else ())

    def forward(
        self,
        latents: Tensor,
        previous: Tensor,
        coefficients: Tensor,
        guidance_weights: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        prompt_mask: Tensor,
        guidance_scale: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (next_latents, prediction), (B, C, h, w) fp32 each. All inputs but the text's keys and values are fp32.

        latents, previous: (B, C, h, w); `previous` is the last step's prediction (zeros at first, with c_previous 0).
        coefficients: (8,), a row of runtime.schedule: timestep, c_in, c_x, c_v, c_previous, c_noise, p_x, p_v.
        guidance_weights: (k,): [1 - g, g] for [unconditional, conditional] text, or [1] for one text.
        text_keys, text_values: (blocks, k, B, H, L, head_dim), in the type of the weights, from TextProjection.
        prompt_mask: (k, B, L), 1 for text and 0 for padding.
        guidance_scale (1,) and noise (B, C, h, w), standard normal: only models with guidance_embeds, which need them.
        """
        config = self.transformer.config
        timestep, c_in, c_x, c_v, c_previous, c_noise, p_x, p_v = (coefficients[i] for i in range(8))
        num_texts, batch = prompt_mask.shape[:2]
        dtype = self.transformer.proj_out.weight.dtype
        guidance = None if guidance_scale is None else (guidance_scale * config.guidance_embeds_scale).expand(num_texts * batch)

        network_input = (c_in * latents).to(dtype)
        velocities = self.transformer.denoise(
            network_input[None].expand(num_texts, -1, -1, -1, -1).flatten(0, 1),
            [BlockText(text_keys, text_values, block) for block in range(text_keys.shape[0])],
            timestep.expand(num_texts * batch),
            prompt_mask.flatten(0, 1),
            guidance,
        )
        velocities = velocities.float().unflatten(0, (num_texts, batch))
        velocity = (guidance_weights[:, None, None, None, None] * velocities).sum(0)

        next_latents = c_x * latents + c_v * velocity + c_previous * previous
        if noise is not None:
            next_latents = next_latents + c_noise * noise
        return next_latents, p_x * latents + p_v * velocity


def guidance_weights(guidance: float, *, embedded: bool) -> Tensor:
    """Weights of the texts, fp32: [1 - g, g] (unconditional, conditional), or [1] where guidance is embedded or at most 1.

    v_uncond + g (v_cond - v_uncond) = (1 - g) v_uncond + g v_cond.
    """
    return torch.tensor([1.0]) if embedded or guidance <= 1 else torch.tensor([1.0 - guidance, guidance])
