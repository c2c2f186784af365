"""The prepared sprites, read back: pictures on the device, names and tokenizer beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.tiny.captions import Names

SIDE = 128  # px of a sprite


@dataclass(frozen=True, kw_only=True)
class Sprites:
    """rgba: (S, 4, 128, 128) fp16, 0 to 1, colour premultiplied by alpha.

    The first `num_classes` are what the model is taught to draw.
    """

    rgba: Tensor
    names: list[Names]
    characters: list[str]
    num_classes: int
    tokenizer_json: str

    @property
    def class_names(self) -> list[str]:
        return [names["en"][0] for names in self.names[: self.num_classes]]


def load_sprites(path: Path, device: torch.device | str = "cpu") -> Sprites:
    """Read what `train.tiny.prepare_sprites` wrote. Raises FileNotFoundError with the command that makes it."""
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"got no file {path}; make it with: python -m train.tiny.prepare_sprites --out {path}")
    with safe_open(path, framework="pt") as file:
        metadata, straight = file.metadata(), file.get_tensor("rgba").to(device)
    rgba = straight.permute(0, 3, 1, 2).float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1).half()
    return Sprites(
        rgba=rgba,
        names=json.loads(metadata["names"]),
        characters=json.loads(metadata["characters"]),
        num_classes=int(metadata["num_classes"]),
        tokenizer_json=metadata["tokenizer"],
    )
