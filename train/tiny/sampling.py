"""Pictures from captions, a batch at a time, with the weights of a model folder in their exported types: transformer in fp16, text
encoder and autoencoder in bf16. The schedule's tables are the runtime's: what is judged here is what the runtime draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor

from runtime.schedule import apply_row, make_schedule
from sana_ref import checkpoint as checkpoints
from sana_ref.autoencoder import AutoencoderDC
from sana_ref.text_encoder import Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel
from train.tiny.models import FLOW_SHIFT, PX_PER_LATENT
from train.tiny.text import encode_text
from train.tiny.tokenizer import BOS_ID, encode_captions

__all__ = ["Painter"]

LENGTH = 64  # text positions: enough for every caption; padding beyond them changes nothing


@dataclass(frozen=True, kw_only=True)
class Painter:
    """The three models, ready to draw."""

    vae: AutoencoderDC
    transformer: SanaTransformer2DModel
    text_encoder: Gemma2Encoder
    tokenizer: Any
    device: torch.device

    @classmethod
    def of(cls, model: Path, device: torch.device) -> Self:
        """From a model folder. On a CPU the rounded weights compute in fp32."""
        checkpoint = checkpoints.load(model)
        on_gpu = device.type == "cuda"
        half, brain = (torch.float16, torch.bfloat16) if on_gpu else (torch.float32, torch.float32)
        return cls(
            vae=checkpoint.vae(brain, device).eval(),
            transformer=checkpoint.transformer(half, device).eval(),
            text_encoder=checkpoint.text_encoder(brain, device).eval(),
            tokenizer=Tokenizer.from_file(str(checkpoint.tokenizer_path)),
            device=device,
        )

    @torch.no_grad()
    def draw(
        self,
        captions: list[str],
        *,
        width: int = 512,
        height: int = 512,
        steps: int = 20,
        guidance: float = 4.5,
        seed: int = 0,
        batch: int = 128,
    ) -> Tensor:
        """(n, 3, height, width) uint8 on the CPU.

        The k-th caption gets the k-th noise of the seed, whatever the batch.
        """
        schedule = make_schedule("flow_dpm_solver", steps, FLOW_SHIFT)
        shape = (32, height // PX_PER_LATENT, width // PX_PER_LATENT)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((len(captions), *shape), generator=generator)
        ids, prefix = encode_captions(self.tokenizer, captions, LENGTH)
        empty = torch.zeros(1, ids.shape[1], dtype=torch.long, device=self.device)
        empty[0, 0] = BOS_ID
        dtype = self.transformer.proj_out.weight.dtype
        pictures = []
        for start in range(0, len(captions), batch):
            latents = noise[start : start + batch].to(self.device)
            rows = torch.from_numpy(ids[start : start + batch]).long().to(self.device)
            text, mask = encode_text(self.text_encoder, rows, prefix)
            # The negative prompt has no instruction, so <bos> alone is visible; the rest is masked, whatever it says.
            nothing, nothing_mask = encode_text(self.text_encoder, empty, prefix)
            texts = torch.cat([nothing.expand_as(text), text]).to(dtype)
            masks = torch.cat([nothing_mask.expand_as(mask), mask])
            previous = torch.zeros_like(latents)
            for row in schedule.table:
                time = torch.full((2 * len(latents),), float(row[0]), device=self.device)
                empty_v, text_v = self.transformer(torch.cat([latents, latents]).to(dtype), texts, time, masks).float().chunk(2)
                latents, previous = apply_row(row, latents, empty_v + guidance * (text_v - empty_v), previous)
            code = (latents / self.vae.config.scaling_factor).to(self.vae.decoder.conv_in.weight.dtype)
            for part in code.split(32):
                pictures.append(((self.vae.decode(part).float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
        return torch.cat(pictures)
