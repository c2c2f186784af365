"""A handful of drawn shapes in place of the emoji: the tests need neither the font nor the package `emoji`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from train.tiny.sprites import SIDE, Sprites, load_sprites

OBJECTS = ("cat", "owl", "pizza", "key", "red apple", "star", "bus", "drum", "fox", "crab", "bell", "kite")


def shape(index: int) -> np.ndarray:
    """(128, 128, 4) uint8: a disc or a square with a colour of its own."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    inside = (np.hypot(x, y) < 60) if index % 2 else (np.maximum(abs(x), abs(y)) < 55)
    colour = [(40 + 67 * index) % 256, (90 + 131 * index) % 256, (200 + 29 * index) % 256]
    return np.concatenate([np.broadcast_to(np.uint8(colour), (SIDE, SIDE, 3)), np.uint8(255 * inside)[..., None]], axis=2)


@pytest.fixture(scope="session")
def sprite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    from train.tiny.tokenizer import train_tokenizer

    names = [
        {"en": [name], "plural": [name + "s"], **{code: [f"{name} {code}"] for code in ("de", "fr", "es", "it", "zh")}}
        for name in OBJECTS
    ]
    metadata = {
        "names": json.dumps(names),
        "characters": json.dumps(list(OBJECTS)),
        "num_classes": str(len(OBJECTS)),
        "tokenizer": train_tokenizer(names, num_captions=500, vocab_size=512).to_str(),
    }
    path = tmp_path_factory.mktemp("sprites") / "sprites.safetensors"
    save_file({"rgba": np.ascontiguousarray(np.stack([shape(index) for index in range(len(OBJECTS))]))}, path, metadata=metadata)
    return path


@pytest.fixture(scope="session")
def sprites(sprite_file: Path) -> Sprites:
    torch.set_num_threads(1)
    return load_sprites(sprite_file)
