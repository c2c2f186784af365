"""Pictures from captions with the weights as they are exported: transformer in fp16, text encoder and autoencoder in bf16.

A batch of captions at a time, with the schedule tables of the runtime: what is judged here is what the runtime draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.schedule import apply_row, make_schedule
from sana_ref.autoencoder import AutoencoderDC
from sana_ref.text_encoder import Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel
from train.tiny.dit import encode_text
from train.tiny.models import FLOW_SHIFT, PX_PER_LATENT, make_text_encoder, make_transformer, make_vae
from train.tiny.tokenizer import BOS_ID, encode_captions

EXPORT_DTYPES = {"vae": torch.bfloat16, "transformer": torch.float16, "text_encoder": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Painter:
    """The three models, ready to draw. `length` is the number of text positions (padding beyond it changes nothing)."""

    vae: AutoencoderDC
    transformer: SanaTransformer2DModel
    text_encoder: Gemma2Encoder
    tokenizer: Any
    length: int
    scaling_factor: float
    device: torch.device

    @classmethod
    def of(
        cls,
        configs: Mapping[str, dict[str, Any]],
        weights: Mapping[str, Mapping[str, Tensor]],
        *,
        tokenizer: Any,
        length: int,
        scaling_factor: float,
        device: torch.device,
    ) -> Painter:
        """From state dicts in their exported types. On a CPU the rounded weights compute in fp32."""
        makers = {"vae": make_vae, "transformer": make_transformer, "text_encoder": make_text_encoder}
        models = {}
        for name, make in makers.items():
            model = make(configs[name])
            model.load_state_dict(weights[name])
            dtype = EXPORT_DTYPES[name] if device.type == "cuda" else torch.float32
            models[name] = model.to(device, dtype).eval().requires_grad_(False)
        return cls(**models, tokenizer=tokenizer, length=length, scaling_factor=scaling_factor, device=device)

    @torch.no_grad()
    def draw(
        self,
        captions: list[str],
        *,
        width: int = 256,
        height: int = 256,
        steps: int = 20,
        guidance: float = 4.5,
        seed: int = 0,
        batch: int = 250,
    ) -> Tensor:
        """(n, 3, height, width) fp32 on the device, -1 to 1.

        The k-th caption gets the k-th noise of the seed, whatever the batch.
        """
        schedule = make_schedule("flow_dpm_solver", steps, FLOW_SHIFT)
        shape = (32, height // PX_PER_LATENT, width // PX_PER_LATENT)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((len(captions), *shape), generator=generator)
        ids, prefix = encode_captions(self.tokenizer, captions, self.length)
        empty = torch.zeros(1, ids.shape[1], dtype=torch.long, device=self.device)
        empty[0, 0] = BOS_ID
        pictures = []
        for start in range(0, len(captions), batch):
            latent = noise[start : start + batch].to(self.device)
            rows = torch.from_numpy(ids[start : start + batch]).long().to(self.device)
            text, mask = encode_text(self.text_encoder, rows, prefix)
            # The negative prompt has no instruction, so <bos> alone is visible; the rest is masked, whatever it says.
            nothing, nothing_mask = encode_text(self.text_encoder, empty, prefix)
            texts = torch.cat([nothing.expand_as(text), text])
            masks = torch.cat([nothing_mask.expand_as(mask), mask])
            dtype = self.transformer.proj_out.weight.dtype
            previous = torch.zeros_like(latent)
            for row in schedule.table:
                time = torch.full((2 * len(latent),), float(row[0]), device=self.device)
                wide = torch.cat([latent, latent]).to(dtype)
                empty_v, text_v = self.transformer(wide, texts.to(dtype), time, masks).float().chunk(2)
                velocity = empty_v + guidance * (text_v - empty_v)
                latent, previous = apply_row(row, latent, velocity, previous)
            code = (latent / self.scaling_factor).to(self.vae.decoder.conv_in.weight.dtype)
            for part in code.split(64):
                pictures.append(self.vae.decode(part).float().clamp(-1, 1))
        return torch.cat(pictures)
