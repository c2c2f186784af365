"""Small data sets, and encoders that need no weights, for the tests of train/data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZES = [(96, 64), (64, 64), (64, 120)]
Files = dict[str, bytes]


def picture(number: int, kind: str = "PNG") -> bytes:
    """A coloured rectangle on a ground, of one of three sizes."""
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    pixels = np.broadcast_to(rng.integers(0, 255, 3).astype(np.uint8), (height, width, 3)).copy()
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def captions(number: int) -> bytes:
    return json.dumps({"captions": [{"text": f"picture {number}", "score": 28}, {"text": "a box", "score": 26.5}]}).encode()


def sample_files(num: int) -> Files:
    return {name: content for i in range(num) for name, content in ((f"{i:03}.png", picture(i)), (f"{i:03}.json", captions(i)))}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_of(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


class FakeEncoders:
    """Latents are means of 32 x 32 px; a text's embedding says how long it is and what it begins with."""

    vae_digest, text_digest, dtype = "0" * 64, "1" * 64, "float32"

    def latents(self, pixels: np.ndarray) -> Tensor:
        count, height, width, channels = pixels.shape
        cells = pixels.reshape(count, height // 32, 32, width // 32, 32, channels).astype(np.float32).mean(axis=(2, 4))
        return torch.from_numpy(np.moveaxis(cells, -1, 1).copy())

    def texts(self, captions: list[str]) -> list[Tensor]:
        return [torch.tensor([[len(text), ord(text[0])]] * (1 + len(text) % 5), dtype=torch.float32) for text in captions]


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file that is not hidden."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
