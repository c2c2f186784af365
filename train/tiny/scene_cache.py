"""The scenes of sana-tiny as a cache that training reads: composed, encoded and written without a picture on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sana_ref.autoencoder import AutoencoderDC
from sana_ref.checkpoint import Checkpoint
from train.data.cache import Identity, Shards, pack_shard
from train.data.encoders import expected_identity
from train.data.report import Report
from train.tiny.caption_cache import captions_of, training_scenes
from train.tiny.scenes import SceneTensors, compose, palette
from train.tiny.settings import ScenesSettings
from train.tiny.sprites import load_sprites
from train.tiny.text import encode_text
from train.tiny.tokenizer import INSTRUCTION, num_instruction_tokens

__all__ = ["SceneShards"]

SHARD_SIZE = 4096
PICTURES_AT_ONCE, CAPTIONS_AT_ONCE = 128, 2048


class SceneShards(Shards):
    """checkpoint: the encoders. folder: where the captions are, or are made. Latents are kept in fp16, text in bf16."""

    def __init__(self, checkpoint: Checkpoint, settings: ScenesSettings, out: Path, device: torch.device, *, folder: Path) -> None:
        captions = captions_of(settings, folder)
        self.scenes = training_scenes(settings, load_sprites(settings.sprites).class_names)
        num = sum(map(len, self.scenes.values()))
        widest = max(width * height for width, height in settings.sizes)
        encoders = expected_identity(checkpoint)
        identity = Identity(
            vae=encoders["vae"],
            text_encoder=encoders["text_encoder"],
            dtype="float16",
            data=hashlib.sha256(captions.read_bytes()).hexdigest(),
            resolution=round(widest**0.5),
            max_pixels=widest,
            shard_size=SHARD_SIZE,
        )
        super().__init__(identity, Report(total=num, max_share=0.0), num, out)
        with np.load(captions) as arrays:
            self.ids = {size: arrays[f"{size} ids"] for size in self.scenes}
        self.sprites = load_sprites(settings.sprites, device)
        self.tokenizer = Tokenizer.from_str(self.sprites.tokenizer_json)
        self.prefix = num_instruction_tokens(self.tokenizer)
        self.device = device
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        vae = checkpoint.vae(half, device).eval().requires_grad_(False)
        self.vae: AutoencoderDC = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cuda":
            from train.autoencoder.fast_norm import install  # imports Triton

            install(self.vae)
        self.text_encoder = checkpoint.text_encoder(half, device).eval().requires_grad_(False)

    @torch.inference_mode()
    def write_shard(self, index: int) -> bytes:
        """The bytes of shard `index`: see pack_shard."""
        begin, end = index * SHARD_SIZE, (index + 1) * SHARD_SIZE
        tensors: dict[str, Tensor] = {}
        samples: list[dict[str, Any]] = []
        before = 0
        for size, scenes in self.scenes.items():
            rows = slice(max(0, begin - before), max(0, min(len(scenes), end - before)))
            before += len(scenes)
            if rows.start >= rows.stop:
                continue
            ids = self.ids[size][rows]  # (n, K, S)
            # The first word and the instruction's last space are one token: the words are cut, not the tokens.
            words = self.tokenizer.decode_batch(ids.reshape(-1, ids.shape[-1]).tolist())
            captions = [text.removeprefix("\n".join(INSTRUCTION)) for text in words]
            texts = self._texts(ids)
            width, height = map(int, size.split("x"))
            for row, latent in enumerate(self._latents(size, rows, width, height)):
                number = len(samples)
                tensors[f"{number}.latent"] = latent.clone()
                own = range(row * ids.shape[1], (row + 1) * ids.shape[1])
                tensors |= {f"{number}.text.{k}": texts[caption] for k, caption in enumerate(own)}
                said = [captions[caption] for caption in own]
                key = f"{size}/{rows.start + row}"
                samples.append({"key": key, "width": width, "height": height, "captions": said, "scores": [0.0] * len(said)})
        return pack_shard(tensors, samples)

    def _latents(self, size: str, rows: slice, width: int, height: int) -> Tensor:
        """(n, C, h, w) fp16 on the CPU, times the scaling factor."""
        scenes = SceneTensors.of(self.scenes[size].select(np.arange(rows.start, rows.stop)), self.device)
        colours, found = palette(self.device), []
        dtype = next(self.vae.parameters()).dtype
        for start in range(0, rows.stop - rows.start, PICTURES_AT_ONCE):
            part = scenes[start : start + PICTURES_AT_ONCE]
            pictures = compose(part, self.sprites.rgba, width=width, height=height, colours=colours)
            latents = self.vae.encode(pictures.to(dtype, memory_format=torch.channels_last)).float()
            found.append((latents * self.vae.config.scaling_factor).half())
        return torch.cat(found).cpu().contiguous()

    def _texts(self, ids: np.ndarray) -> list[Tensor]:
        """ids: (n, K, S). Of each caption (l, C) bf16 on the CPU, without padding."""
        found: list[Tensor] = []
        for part in torch.from_numpy(ids.reshape(-1, ids.shape[-1])).long().split(CAPTIONS_AT_ONCE):
            text, mask = encode_text(self.text_encoder, part.to(self.device), self.prefix)
            lengths = mask.sum(1).tolist()
            found += [row[:length].clone() for row, length in zip(text.to(torch.bfloat16).cpu(), lengths, strict=True)]
        return found
