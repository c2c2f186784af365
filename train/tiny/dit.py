"""Flow matching on cached latents, transformer and text encoder together; before it, the text encoder alone on what captions say.

x_s = (1 - s) x0 + s noise, target noise - x0, s = shift(sigmoid(normal)), the transformer's time is 1000 s. One caption in ten is
replaced by the empty prompt, whose encoding is <bos> and padding. The encoder is causal, so <bos> is encoded alike in every
caption: dropping a caption is masking all of it but the first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref.text_encoder import Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel
from train.tiny.flat import FlatParameters
from train.tiny.models import FLOW_SHIFT
from train.tiny.tokenizer import PAD_ID

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Encoded scenes of one bucket, on the device.

    latents: (n, 32, h, w) 16-bit, times the scaling factor. ids: (n, K, S) int16, K captions a scene. facts: (n, 4) int64: kind,
    first, second (-1: none), colour.
    """

    latents: Tensor
    ids: Tensor
    facts: Tensor


def select_text(states: Tensor, prefix: int) -> Tensor:
    """Index 0 and the last L - 1 of S = prefix + L - 2: the instruction is read by the encoder and not seen by the transformer."""
    return torch.cat([states[:, :1], states[:, prefix - 1 :]], dim=1)


def encode_text(encoder: Gemma2Encoder, ids: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """ids (B, S) int64 -> text (B, L, C) and mask (B, L), 1 for text.

    Padding is last and the encoder causal: no mask is needed inside.
    """
    text = select_text(encoder(ids, torch.ones_like(ids)), prefix)
    return text, select_text((ids != PAD_ID).long(), prefix)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_step(
    transformer: SanaTransformer2DModel,
    encoder: Gemma2Encoder,
    flat: FlatParameters,
    cache: LatentCache,
    *,
    prefix: int,
    batch: int,
    stats: Tensor,
) -> Callable[[], None]:
    """One training step on `batch` scenes of the cache, drawn with replacement. stats: (3,), sums of loss, norm, 1."""
    dtype = flat.working.dtype
    num, captions = cache.ids.shape[:2]
    device = cache.latents.device

    def step() -> None:
        with torch.no_grad():
            rows = torch.randint(num, (batch,), device=device)
            ids = cache.ids[rows, torch.randint(captions, (batch,), device=device)].long()
            x0 = cache.latents[rows].float()
            noise = torch.randn_like(x0)
            sigma = shift_sigma(torch.randn(batch, device=device).sigmoid(), FLOW_SHIFT)
            wide = sigma[:, None, None, None]
            noisy = ((1 - wide) * x0 + wide * noise).to(dtype)
            keep = (torch.rand(batch, 1, device=device) >= CAPTION_DROPOUT).long()
        text, mask = encode_text(encoder, ids, prefix)
        mask = torch.cat([mask[:, :1], mask[:, 1:] * keep], dim=1)
        velocity = transformer(noisy, text, sigma * 1000, mask)
        loss = F.mse_loss(velocity.float(), noise - x0)
        norm = flat.step_with(loss)
        with torch.no_grad():
            stats.add_(torch.stack([loss.detach(), norm, torch.ones_like(norm)]).nan_to_num(0.0, 0.0, 0.0))

    return step


class FactHeads(nn.Module):
    """Reads kind, first object, second object (or none) and colour off the text, twice: off its last token and off the mean."""

    def __init__(self, channels: int, num_classes: int, num_colours: int, num_kinds: int) -> None:
        super().__init__()
        self.sizes = [num_kinds, num_classes, num_classes + 1, num_colours]
        self.last = nn.Linear(channels, sum(self.sizes))
        self.mean = nn.Linear(channels, sum(self.sizes))

    def forward(self, text: Tensor, mask: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the four facts, and the share of captions whose kind and first object both readings give."""
        weights = mask.to(text.dtype)
        mean = (text * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        final = torch.arange(text.shape[1], device=text.device) == mask.sum(1, keepdim=True) - 1  # (B, L)
        last = (text * final.to(text.dtype)[..., None]).sum(1)
        kind, first, second, colour = facts.unbind(1)
        targets = (kind, first, second + 1, colour)
        loss, right = text.new_zeros((), dtype=torch.float32), torch.ones_like(kind, dtype=torch.bool)
        for logits in (self.mean(mean), self.last(last)):
            for index, (part, target) in enumerate(zip(logits.float().split(self.sizes, dim=1), targets, strict=True)):
                loss = loss + F.cross_entropy(part, target)
                if index < 2:
                    right = right & (part.argmax(1) == target)
        return loss, right.float().mean()


def make_text_step(
    encoder: Gemma2Encoder, heads: FactHeads, flat: FlatParameters, cache: LatentCache, *, prefix: int, batch: int, stats: Tensor
) -> Callable[[], None]:
    """One step of the text encoder alone. stats: (4,), sums of loss, norm, 1, accuracy."""
    num, captions = cache.ids.shape[:2]
    device = cache.ids.device

    def step() -> None:
        rows = torch.randint(num, (batch,), device=device)
        ids = cache.ids[rows, torch.randint(captions, (batch,), device=device)].long()
        text, mask = encode_text(encoder, ids, prefix)
        loss, right = heads(text, mask, cache.facts[rows])
        norm = flat.step_with(loss)
        with torch.no_grad():
            stats.add_(torch.stack([loss.detach(), norm, torch.ones_like(norm), right]).nan_to_num(0.0, 0.0, 0.0))

    return step
