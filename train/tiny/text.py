"""sana-tiny's text encoder: trained on what captions say, before there is a transformer, as a language model is.

Four facts of a scene (its kind, first and second object, colour) are read off the text. The encoder is frozen afterwards, so that
the transformer trains on cached embeddings, as every Sana does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sana_ref.text_encoder import Gemma2Encoder
from train.objective.place import Place
from train.parallel.processes import Processes
from train.tiny.caption_cache import captions_of
from train.tiny.captions import COLOUR_NAMES, KIND_NAMES
from train.tiny.models import TEXT_ENCODERS, make_text_encoder
from train.tiny.settings import SceneTextExperiment
from train.tiny.sprites import load_sprites
from train.tiny.table import TableSource
from train.tiny.tokenizer import PAD_ID, num_instruction_tokens
from train.trainer.checkpoint import latest
from train.trainer.errors import TrainingError
from train.trainer.loop import Trainer

__all__ = ["SETTINGS", "SceneText", "encode_text", "make_trainer", "trained_encoder"]

SETTINGS = SceneTextExperiment


def _select(states: Tensor, prefix: int) -> Tensor:
    """Index 0 and the last L - 1 of S = prefix + L - 2: the instruction is read by the encoder and not seen by the transformer."""
    return torch.cat([states[:, :1], states[:, prefix - 1 :]], dim=1)


def encode_text(encoder: Gemma2Encoder, ids: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """ids (B, S) int64 -> text (B, L, C) and mask (B, L), 1 for text.

    Padding is last and the encoder causal: no mask is needed inside.
    """
    text = _select(encoder(ids, torch.ones_like(ids)), prefix)
    return text, _select((ids != PAD_ID).long(), prefix)


class FactHeads(nn.Module):
    """Reads kind, first object, second object (or none) and colour off the text, twice: off its last token and off the mean."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.sizes = [len(KIND_NAMES), num_classes, num_classes + 1, len(COLOUR_NAMES)]
        self.last = nn.Linear(channels, sum(self.sizes))
        self.mean = nn.Linear(channels, sum(self.sizes))

    def forward(self, text: Tensor, mask: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the facts, and the share of captions whose kind and objects both readings give.

        facts: (B, 4) int64: kind, first, second (-1: none), colour.
        """
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
                if index < 3:
                    right = right & (part.argmax(1) == target)
        return loss, right.float().mean()


class SceneText(nn.Module):
    """Encoder and heads. ids: (B, S) int64; facts: (B, 4) int64: kind, first, second (-1: none), colour."""

    def __init__(self, encoder: Gemma2Encoder, num_classes: int, prefix: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = FactHeads(encoder.config.hidden_size, num_classes)
        self.prefix = prefix

    def forward(self, ids: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        text, mask = encode_text(self.encoder, ids, self.prefix)
        loss, right = self.heads(text, mask, facts)
        return loss, right


def _objective(model: Callable[..., tuple[Tensor, Tensor]], batch: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    loss, right = model(batch["ids"].long(), batch["facts"])
    return {"loss": loss, "right": right}


def make_trainer(settings: SceneTextExperiment, *, processes: Processes, log: Callable[[str], None] = print) -> Trainer:
    """The run that `settings` describes, at its beginning. Raises TrainingError, FileNotFoundError."""
    if processes.world_size > 1:
        raise TrainingError(f"parallel: got {processes.world_size} processes; expected one, which takes less than a minute.")
    sprites, device = load_sprites(settings.scenes.sprites), processes.device
    path = captions_of(settings.scenes, settings.trainer.folder.parent, log=log)
    with np.load(path) as arrays:
        first = f"{settings.scenes.sizes[0][0]}x{settings.scenes.sizes[0][1]}"
        ids = torch.from_numpy(arrays[f"{first} ids"]).to(device)  # (n, K, S)
        facts = torch.from_numpy(arrays[f"{first} facts"]).long().to(device)  # (n, 4)
    prefix = num_instruction_tokens(Tokenizer.from_str(sprites.tokenizer_json))
    torch.manual_seed(settings.trainer.seed)
    model = SceneText(make_text_encoder(TEXT_ENCODERS[settings.size]), sprites.num_classes, prefix)

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        size = settings.trainer.micro_batch
        rows = torch.randint(len(ids), (size,), generator=generator).to(device)
        which = torch.randint(ids.shape[1], (size,), generator=generator).to(device)
        return {"ids": ids[rows, which], "facts": facts[rows]}

    source = TableSource(make, seed=settings.trainer.seed, what=hashlib.sha256(path.read_bytes()).hexdigest())
    kept = settings.model_dump(mode="json", exclude={"env": True, "trainer": {"folder"}, "scenes": {"sprites"}})
    return Trainer(model.to(device).train(), source, settings.trainer, _objective, config=kept, log=log)


def trained_encoder(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's encoder, under its own names. Raises TrainingError if there is no checkpoint."""
    from safetensors.torch import load_file

    path = latest(folder)
    if path is None:
        raise TrainingError(f"{folder}: got no checkpoint; expected a run of scene_text")
    prefix = "encoder."
    found = load_file(path / "ema.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
