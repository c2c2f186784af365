"""Text encoder and decoder behind the boundaries that a bundle has: token ids or fp32 in, fp32 out, whatever they compute in."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sana_ref.autoencoder import AutoencoderDC
from sana_ref.config import refuse_unless
from sana_ref.fused_decoder import FusedDecoder
from sana_ref.text_encoder import Gemma2Encoder

__all__ = [
    "DECODER_INPUTS",
    "DECODER_OUTPUTS",
    "TEXT_ENCODER_INPUTS",
    "TEXT_ENCODER_OUTPUTS",
    "TEXT_ROWS_INPUTS",
    "TOKEN_TABLE",
    "DecoderForExport",
    "TextEncoderForExport",
    "TextRowsForExport",
    "select_tokens",
]

TEXT_ENCODER_INPUTS = ("input_ids", "attention_mask")
TEXT_ENCODER_OUTPUTS = ("prompt_embeds",)
TEXT_ROWS_INPUTS = ("inputs_embeds", "attention_mask")
TOKEN_TABLE = "encoder.embed_tokens.weight"  # the table of tokens in TextEncoderForExport
DECODER_INPUTS = ("latents",)
DECODER_OUTPUTS = ("images",)


def select_tokens(x: Tensor, length: int) -> Tensor:
    """(B, S, ...) -> (B, length, ...): the first token (BOS) and the last length - 1; all of them if S is length.

    An instruction stands between BOS and the prompt, and padding is on the right and sized so that this drops the instruction.
    """
    return torch.cat([x[:, :1], x[:, 1 - length :]], dim=1)


class TextEncoderForExport(nn.Module):
    """Token ids to the embeddings that the denoiser takes."""

    def __init__(self, encoder: Gemma2Encoder, max_sequence_length: int) -> None:
        super().__init__()
        refuse_unless(max_sequence_length > 1, f"max_sequence_length: got {max_sequence_length}; expected 2 or more tokens")
        self.encoder = encoder
        self.max_sequence_length = max_sequence_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, S) int64, S >= max_sequence_length = L -> prompt_embeds (B, L, C) fp32."""
        return select_tokens(self.encoder(input_ids, attention_mask), self.max_sequence_length).float()


class TextRowsForExport(nn.Module):
    """What is behind the look-up of a TextEncoderForExport: rows of its table to embeddings. It has no table."""

    def __init__(self, whole: TextEncoderForExport) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(whole.encoder)
        del self.encoder.embed_tokens
        self.max_sequence_length = whole.max_sequence_length

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """inputs_embeds (B, S, C) in the type of the weights, attention_mask (B, S) int64 -> prompt_embeds (B, L, C) fp32."""
        return select_tokens(self.encoder.encode_rows(inputs_embeds, attention_mask), self.max_sequence_length).float()


class DecoderForExport(nn.Module):
    """Sampler output to pixels. The decoder may also be a fused one, of the same configuration."""

    def __init__(self, vae: AutoencoderDC, decoder: FusedDecoder | None = None) -> None:
        super().__init__()
        self.decoder = vae.decoder if decoder is None else decoder
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) fp32, still times scaling_factor -> images (B, 3, 32h, 32w) fp32, about -1 to 1, not clamped."""
        return self.decoder((latents / self.scaling_factor).to(self.decoder.conv_in.weight.dtype)).float()
