"""The text's part of the transformer: what depends on the prompt and on no step, as a module of its own.

Between text encoder and denoiser it makes, once a picture, the keys and values that each block's cross-attention reads in every
step. The modules are the transformer's: nothing has a second name or a second copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sana_ref.transformer import SanaTransformer2DModel

__all__ = ["INPUTS", "OUTPUTS", "TextProjection", "is_text_parameter"]

INPUTS = ("prompt_embeds",)
OUTPUTS = ("text_keys", "text_values")

_TEXT_MODULES = ("caption_projection.", "caption_norm.", "attn2.to_k.", "attn2.to_v.", "attn2.norm_k.")


def is_text_parameter(name: str) -> bool:
    """Whether TextProjection reads the parameter of this name, or the step does: never both."""
    return any(f".{module}" in f".{name}" for module in _TEXT_MODULES)


class TextProjection(nn.Module):
    """Prompt embeddings to the keys and values of all blocks."""

    def __init__(self, transformer: SanaTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return (text_keys, text_values), (blocks, k, B, H, L, head_dim) each, in the type of the weights.

        prompt_embeds: (k, B, L, caption_channels) fp32, of k texts for each of B pictures. A block's part of the result lies in one
        piece, as attention reads it.
        """
        num_texts, batch = prompt_embeds.shape[:2]
        dtype = self.transformer.caption_norm.weight.dtype
        text = self.transformer.project_text(prompt_embeds.to(dtype).flatten(0, 1))
        blocks = [block.attn2.keys_values(text) for block in self.transformer.transformer_blocks]
        keys, values = (torch.stack(parts).unflatten(1, (num_texts, batch)) for parts in zip(*blocks, strict=True))
        return keys, values
