"""A checkpoint's autoencoder and text encoder, as the cache asks for them."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.prompt import PromptCutWarning, PromptTokenizer
from sana_ref import checkpoint as checkpoints
from sana_ref.components import TextEncoderForExport
from sana_ref.pipeline import component_dtypes

__all__ = ["CheckpointEncoders", "expected_identity"]


def expected_identity(checkpoint: checkpoints.Checkpoint) -> dict[str, str]:
    """What a cache's identity must say to be of this checkpoint's encoders: see reading.Cache."""
    return {"vae": checkpoint.component_digest("vae"), "text_encoder": _text_digest(checkpoint)}


def _text_digest(checkpoint: checkpoints.Checkpoint) -> str:
    """Of what decides the embeddings: the text encoder, the tokenizer, and what is put around a prompt."""
    tokenizer = hashlib.sha256(checkpoint.tokenizer_path.read_bytes()).hexdigest()
    content = [checkpoint.component_digest("text_encoder"), tokenizer, asdict(checkpoint.prompt)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class CheckpointEncoders:
    """dtype: of the computation and of what is stored; the types of the networks as for drawing. Raises CheckpointError."""

    def __init__(self, model: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        checkpoint = checkpoints.load(model, components=("vae", "text_encoder"))
        dtypes = component_dtypes(dtype)
        self.vae_digest, self.text_digest = expected_identity(checkpoint).values()
        self.dtype = str(dtype).removeprefix("torch.")
        self._dtypes, self._device = dtypes, torch.device(device)
        self._vae = checkpoint.vae(dtypes["vae"], device).eval()
        self._tokenizer = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt)
        length = checkpoint.prompt.max_sequence_length
        self._text_encoder = TextEncoderForExport(checkpoint.text_encoder(dtypes["text_encoder"], device), length).eval()

    @torch.inference_mode()
    def latents(self, pixels: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, C, H/32, W/32), times the scaling factor, on the CPU."""
        images = torch.from_numpy(pixels).to(self._device).movedim(-1, 1).float() / 127.5 - 1
        latents = self._vae.encode(images.to(self._dtypes["vae"]))
        return (latents * self._vae.config.scaling_factor).cpu()

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> list[Tensor]:
        """Of each caption (l, C). A caption longer than the model reads is cut, as when drawing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCutWarning)
            tokens = self._tokenizer.encode(captions)
        ids, mask = (torch.from_numpy(array).to(self._device) for array in (tokens.ids, tokens.mask))
        embeds = self._text_encoder(ids, mask).to(self._dtypes["text_encoder"]).cpu()
        lengths = tokens.selected_mask.sum(axis=1).astype(int)  # padding is on the right
        return [row[:length] for row, length in zip(embeds, lengths, strict=True)]
