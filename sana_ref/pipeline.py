"""The reference: prompt to picture in PyTorch, from the same modules that are exported and the same schedules and noise that ship.

What an engine draws is compared with what this draws, component by component and as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.errors import RequestError
from runtime.image import to_images
from runtime.noise import check_seed, normal_batch
from runtime.prompt import PromptTokenizer, check_prompts
from runtime.schedule import Schedule, make_schedule
from sana_ref import checkpoint as checkpoints
from sana_ref.components import DecoderForExport, TextEncoderForExport
from sana_ref.step import DenoiserStep, guidance_weights
from sana_ref.text_projection import TextProjection

__all__ = ["SanaReference", "TextBatch", "component_dtypes"]

OnStep = Callable[[int, int, Tensor], None]  # step from 1, number of steps, latents (B, C, h, w) after it


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """What the denoiser is told. Weighted velocities of k texts are added: [unconditional, conditional], or one text."""

    weights: Tensor  # (k,) fp32
    keys: Tensor  # (blocks, k, B, H, L, head_dim), in the transformer's type
    values: Tensor  # the same
    mask: Tensor  # (k, B, L) fp32, 1 for text and 0 for padding


def component_dtypes(dtype: torch.dtype) -> dict[checkpoints.ComponentName, torch.dtype]:
    """The type of each network when a precision is asked for. fp16 is the transformer's: Gemma-2 and DC-AE overflow in it."""
    others = torch.bfloat16 if dtype == torch.float16 else dtype
    return {"transformer": dtype, "vae": others, "text_encoder": others}


class SanaReference:
    """A checkpoint, ready to draw.

    dtype: torch.float32, bfloat16 or float16: of the weights and what they are multiplied with. State and normaliser of linear
    attention, statistics of norms, time sinusoids, softmax of the text encoder, latents, guidance and the sampler are fp32 always.
    """

    def __init__(
        self, checkpoint: checkpoints.Checkpoint | str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        """Load the three networks. Raises CheckpointError."""
        if not isinstance(checkpoint, checkpoints.Checkpoint):
            checkpoint = checkpoints.load(checkpoint)
        dtypes = component_dtypes(dtype)
        length = checkpoint.prompt.max_sequence_length
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.tokenizer = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt)
        self.text_encoder = TextEncoderForExport(checkpoint.text_encoder(dtypes["text_encoder"], device), length).eval()
        transformer = checkpoint.transformer(dtypes["transformer"], device)
        self.text_projection, self.denoiser = TextProjection(transformer).eval(), DenoiserStep(transformer).eval()
        self.decoder = DecoderForExport(checkpoint.vae(dtypes["vae"], device)).eval()

    @torch.inference_mode()
    def encode_prompts(self, prompts: str | Sequence[str], *, negative: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, C) and mask (B, L), fp32. `negative`: without the instruction. Warns about prompts that are cut."""
        tokens = self.tokenizer.encode(check_prompts(prompts), negative=negative)
        ids, mask = (torch.from_numpy(array).to(self.device) for array in (tokens.ids, tokens.mask))
        return self.text_encoder(ids, mask), torch.from_numpy(tokens.selected_mask).to(self.device)

    @torch.inference_mode()
    def encode_text(self, prompts: str | Sequence[str], negative_prompts: str | Sequence[str], guidance: float) -> TextBatch:
        """Everything that the denoiser is told about a batch of pictures at one guidance scale."""
        texts = check_prompts(prompts)
        negatives = check_prompts(negative_prompts, name="negative_prompts")
        negatives = negatives * len(texts) if isinstance(negative_prompts, str) else negatives
        if len(negatives) != len(texts):
            raise RequestError(
                f"negative_prompts: got {len(negatives)}; expected {len(texts)}, one for each prompt, or one string."
            )
        weights = guidance_weights(guidance, embedded=self.checkpoint.transformer_config.guidance_embeds)
        encoded = [self.encode_prompts(texts)]
        if len(weights) == 2:
            encoded.insert(0, self.encode_prompts(negatives, negative=True))
        embeds, mask = (torch.stack(parts) for parts in zip(*encoded, strict=True))
        keys, values = self.text_projection(embeds)
        return TextBatch(weights=weights.to(self.device), keys=keys, values=values, mask=mask)

    @torch.inference_mode()
    def step(
        self,
        latents: Tensor,
        previous: Tensor,
        row: np.ndarray,
        text: TextBatch,
        *,
        guidance: float,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One row of a schedule: (next latents, prediction), (B, C, h, w) fp32 each. See DenoiserStep.

        noise: (B, C, h, w) standard normal, for rows with c_noise; guidance is only read by models that embed it.
        """
        extra: tuple[Tensor, ...] = ()
        if self.checkpoint.transformer_config.guidance_embeds:
            scale = torch.tensor([guidance], dtype=torch.float32, device=self.device)
            extra = (scale, torch.zeros_like(latents) if noise is None else noise)
        coefficients = torch.from_numpy(np.array(row)).to(self.device)
        return self.denoiser(latents, previous, coefficients, text.weights, text.keys, text.values, text.mask, *extra)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Sampled latents (B, C, h, w) fp32 -> images (B, 3, H, W) fp32, nominally -1 to 1, not clamped."""
        return self.decoder(latents)

    def sample(
        self,
        text: TextBatch,
        schedule: Schedule,
        *,
        latents: Tensor,
        guidance: float,
        noise: Callable[[int], Tensor] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run a schedule from standard normal latents (B, C, h, w) fp32 to clean ones; `noise(i)` is the fresh noise of step i."""
        latents = latents.to(self.device) * schedule.initial_scale
        previous = torch.zeros_like(latents)
        for i, row in enumerate(schedule.table):
            fresh = noise(i).to(self.device) if noise is not None and schedule.needs_noise(i) else None
            latents, previous = self.step(latents, previous, row, text, guidance=guidance, noise=fresh)
            if on_step is not None:
                on_step(i + 1, schedule.num_steps, latents)
        return latents

    def generate(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        scheduler: str | Schedule | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """One picture for each prompt, as SanaEngine.generate draws them, in one batch.

        seed: of the first picture, the next integer for the next. width, height: px, multiples of 32; the model's own size unless
        given. What else is left out comes from the checkpoint. Raises RequestError.
        """
        sampler = self.checkpoint.sampler
        schedule = self.schedule(scheduler, steps)
        guidance = sampler.guidance_scale if guidance is None else guidance
        text = self.encode_text(prompts, negative_prompts, guidance)
        shape = (self.checkpoint.transformer_config.in_channels, *self.latent_size(width, height))
        seeds = [check_seed(seed) + i for i in range(text.mask.shape[1])]
        latents = self.sample(
            text,
            schedule,
            latents=torch.from_numpy(normal_batch(seeds, shape)),
            guidance=guidance,
            noise=lambda step: torch.from_numpy(normal_batch(seeds, shape, stream=step + 1)),
            on_step=on_step,
        )
        return to_images(self.decode(latents).cpu().numpy())

    def schedule(self, scheduler: str | Schedule | None = None, steps: int | None = None) -> Schedule:
        """The checkpoint's schedule, or another sampler's with the checkpoint's shift. Raises RequestError."""
        sampler = self.checkpoint.sampler
        timestep_scale = self.checkpoint.transformer_config.timestep_scale
        if isinstance(scheduler, Schedule):
            if steps is not None and steps != scheduler.num_steps:
                raise RequestError(f"steps: got {steps} beside a schedule of {scheduler.num_steps} steps. Leave steps out.")
            made = replace(scheduler.recipe, timestep_scale=timestep_scale).make()
        else:
            made = make_schedule(
                sampler.scheduler if scheduler is None else scheduler,
                sampler.num_steps if steps is None else steps,
                sampler.flow_shift,
                timestep_scale=timestep_scale,
            )
        if (made.scheduler == "scm") != (sampler.scheduler == "scm"):
            raise RequestError(
                f"scheduler: got {made.scheduler!r}; this model was trained for {sampler.scheduler!r} and samples of its kind."
            )
        return made

    def latent_size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """(h, w) in latent cells of a size in px. Raises RequestError."""
        px = self.checkpoint.vae_config.px_per_latent
        cells = []
        for name, side in (("height", height), ("width", width)):
            side = self.checkpoint.transformer_config.sample_size * px if side is None else side
            if isinstance(side, bool) or not isinstance(side, int) or side < px or side % px:
                raise RequestError(f"{name}: got {side!r} px; expected a multiple of {px}.")
            cells.append(side // px)
        return cells[0], cells[1]
