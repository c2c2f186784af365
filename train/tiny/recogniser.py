"""A small classifier that says which emoji a picture shows, and on which colour. It is trained on composed scenes and never on
pictures of the model that it is to judge.

Half of its training pictures went through the autoencoder, so that the blur of decoding is not taken for another object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.tiny.captions import SINGLE
from train.tiny.scenes import SceneArrays, draw_scenes

INPUT_SIDE = 96  # px
RECOGNISER: dict[str, Any] = {"widths": [24, 48, 96, 160], "blocks": 1, "input_side": INPUT_SIDE}


class Residual(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.skip = nn.Identity() if stride == 1 and num_in == num_out else nn.Conv2d(num_in, num_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class Recogniser(nn.Module):
    """Pictures (B, 3, H, W), -1 to 1, of any size (resized to 96 x 96 inside).

    Returns logits of emoji (B, classes) and of colour (B, 10).
    """

    def __init__(self, num_classes: int, num_colours: int, *, widths: list[int], blocks: int, input_side: int) -> None:
        super().__init__()
        self.input_side = input_side
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, stride=2)
        stages: list[nn.Module] = []
        for index, width in enumerate(widths):
            stages.append(Residual(widths[max(0, index - 1)], width, 1 if index == 0 else 2))
            stages += [Residual(width, width, 1) for _ in range(blocks - 1)]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], num_classes + num_colours)

    def features(self, pictures: Tensor) -> Tensor:
        """(n, widths[-1]): what both answers are read from."""
        side = (self.input_side, self.input_side)
        if pictures.shape[2:] != side:
            pictures = F.interpolate(pictures.float(), size=side, mode="bilinear", antialias=True, align_corners=False)
        x = self.stages(self.stem(pictures.to(self.stem.weight.dtype)))
        return F.silu(self.norm(x)).mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.features(pictures)).float()
        return logits[:, : self.num_classes], logits[:, self.num_classes :]


def load(folder: Path) -> tuple[Recogniser, list[str]]:
    """The shipped judge, in fp32 on the CPU, and the English names of its classes. Raises FileNotFoundError."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = {name: config[name] for name in RECOGNISER}
    model = Recogniser(len(config["classes"]), len(config["colours"]), **sizes)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval().requires_grad_(False), config["classes"]


def close_ups(num: int, *, seed: int, num_classes: int) -> SceneArrays:
    """Scenes of one object each, in the sizes and places in which the judge meets objects: whole pictures, and parts of
    pictures that were cut around one object of several.
    """
    scenes = draw_scenes(num, seed=seed, num_objects=num_classes, kind=SINGLE)
    rng = np.random.Generator(np.random.Philox(seed + 1))
    scenes.geometry[:, 0, :2] = 0.5 + rng.uniform(-0.08, 0.08, size=(num, 2))
    scenes.geometry[:, 0, 2] = rng.uniform(0.5, 0.98, size=num)
    return scenes


def augment(pictures: Tensor) -> Tensor:
    """Small changes of brightness and contrast, noise, and blur for a part of them: what a generated picture may do. Values
    stay in -1..1.
    """
    num, device = len(pictures), pictures.device
    gain = 1 + 0.1 * (2 * torch.rand(num, 1, 1, 1, device=device) - 1)
    lift = 0.08 * (2 * torch.rand(num, 3, 1, 1, device=device) - 1)
    pictures = pictures * gain + lift
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.where(torch.rand(num, 1, 1, 1, device=device) < 0.3, blurred, pictures)
    return (pictures + 0.05 * torch.rand(num, 1, 1, 1, device=device) * torch.randn_like(pictures)).clamp(-1, 1)


@torch.no_grad()
def accuracy(recogniser: Recogniser, pictures: Tensor, emoji: Tensor, colour: Tensor, *, batch: int = 512) -> dict[str, float]:
    """Share of pictures whose emoji and whose colour is recognised."""
    right, right_colour = 0, 0
    for start in range(0, len(pictures), batch):
        part = slice(start, start + batch)
        guess, guess_colour = recogniser(pictures[part])
        right += int((guess.argmax(1) == emoji[part]).sum())
        right_colour += int((guess_colour.argmax(1) == colour[part]).sum())
    return {"emoji": right / len(pictures), "colour": right_colour / len(pictures)}
