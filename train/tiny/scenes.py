"""Scenes: what is drawn where, and the picture of it.

`draw_scenes` decides (NumPy, from a seed: the same scenes on every machine); `compose` draws (PyTorch, on the sprites' device,
a batch at a time), so that pictures cost nothing to keep and need never repeat.

Dimensions: n scenes, K = 3 places for objects. Positions are fractions of width and height, sizes fractions of the short side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.tiny.captions import (
    ABOVE_BELOW,
    COLOUR_NAMES,
    COLOURS,
    LEFT_RIGHT,
    SINGLE,
    THREE,
    TWO,
    Scene,
    held_out_colour,
    held_out_pair,
)

PLACES = 3
NEAR, FAR = 0.27, 0.73  # centres of two objects that share a side
KIND_WEIGHTS = (0.55, 0.16, 0.14, 0.09, 0.06)  # by kind: single, left_right, above_below, two, three
SINGLE_SIZE, SHARED_SIZE = (0.58, 0.74), (0.38, 0.47)
SINGLE_JITTER, SHARED_JITTER = 0.05, 0.02
MAX_ANGLE = math.radians(10)
HELD_OUT_SEED = 950


@dataclass(frozen=True, kw_only=True)
class SceneArrays:
    """kind, colour (n,) int64; objects (n, 3) int64, -1 for an empty place; geometry (n, 3, 4) fp32.

    Geometry is centre x, centre y, size, angle (radians).
    """

    kind: np.ndarray
    colour: np.ndarray
    objects: np.ndarray
    geometry: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def scene(self, index: int) -> Scene:
        """What a caption can say of scene `index`."""
        kind = int(self.kind[index])
        second = int(self.objects[index, 1]) if kind in (LEFT_RIGHT, ABOVE_BELOW) else -1
        return Scene(kind, int(self.objects[index, 0]), second, int(self.colour[index]))

    def select(self, rows: np.ndarray) -> SceneArrays:
        return SceneArrays(kind=self.kind[rows], colour=self.colour[rows], objects=self.objects[rows], geometry=self.geometry[rows])


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Which combinations training never shows: colour (C, 10) and pair (C, C), bool, indexed by class."""

    colour: np.ndarray
    pair: np.ndarray

    @classmethod
    def of(cls, class_names: list[str]) -> HeldOut:
        colour = np.array([[held_out_colour(name, colour) for colour in COLOUR_NAMES] for name in class_names])
        pair = np.array([[held_out_pair(name, other) for other in class_names] for name in class_names])
        return cls(colour=colour, pair=pair)

    def hits(self, scenes: SceneArrays) -> np.ndarray:
        """(n,) bool: whether a scene shows a held-out combination. Any object on a colour counts, also in a group."""
        first, second = scenes.objects[:, 0], scenes.objects[:, 1]
        paired = np.isin(scenes.kind, (LEFT_RIGHT, ABOVE_BELOW))
        other = np.where(paired, second, first)
        return self.colour[first, scenes.colour] | self.colour[other, scenes.colour] | (paired & self.pair[first, other])


def draw_scenes(
    num: int, *, seed: int, num_objects: int, aspect: float = 1.0, without: HeldOut | None = None, kind: int | None = None
) -> SceneArrays:
    """`num` scenes of objects 0 to num_objects - 1. `aspect` is width / height; `without` leaves out what training must not see;
    `kind` draws scenes of that kind only."""
    rng = np.random.Generator(np.random.Philox(seed))
    parts: list[SceneArrays] = []
    while (missing := num - sum(map(len, parts))) > 0:
        part = _draw(rng, missing + missing // 4 + 16, num_objects, aspect, kind)
        if without is not None:
            part = part.select(np.flatnonzero(~without.hits(part)))
        parts.append(part.select(np.arange(min(missing, len(part)))))
    return SceneArrays(
        **{field: np.concatenate([getattr(part, field) for part in parts]) for field in ("kind", "colour", "objects", "geometry")}
    )


def _draw(rng: np.random.Generator, num: int, num_objects: int, aspect: float, kind_wanted: int | None) -> SceneArrays:
    weights = np.array(KIND_WEIGHTS)
    kind = rng.choice(len(weights), size=num, p=weights / weights.sum())
    if kind_wanted is not None:
        kind = np.full(num, kind_wanted)
    first = rng.integers(num_objects, size=num)
    second = (first + rng.integers(1, num_objects, size=num)) % num_objects  # never the same
    objects = np.full((num, PLACES), -1)
    objects[:, 0] = first
    objects[:, 1] = np.where(np.isin(kind, (LEFT_RIGHT, ABOVE_BELOW)), second, np.where(kind >= TWO, first, -1))
    objects[:, 2] = np.where(kind == THREE, first, -1)

    centres = np.full((num, PLACES, 2), 0.5)
    beside = (kind == LEFT_RIGHT) | ((kind == TWO) & (aspect >= 1))
    stacked = (kind == ABOVE_BELOW) | ((kind == TWO) & (aspect < 1))
    centres[beside, 0, 0], centres[beside, 1, 0] = NEAR, FAR
    centres[stacked, 0, 1], centres[stacked, 1, 1] = NEAR, FAR
    centres[kind == THREE] = [[0.5, NEAR], [NEAR, FAR], [FAR, FAR]]

    single = kind == SINGLE
    jitter = np.where(single, SINGLE_JITTER, SHARED_JITTER)[:, None, None]
    centres += rng.uniform(-1, 1, size=centres.shape) * jitter
    low, high = (np.where(single, a, b) for a, b in zip(SINGLE_SIZE, SHARED_SIZE, strict=True))
    # One size a scene: two objects of a picture belong together.
    size = np.repeat((low + (high - low) * rng.random(num))[:, None], PLACES, 1)
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE, size=(num, PLACES))
    geometry = np.concatenate([centres, size[..., None], angle[..., None]], axis=2).astype(np.float32)
    return SceneArrays(kind=kind, colour=rng.integers(len(COLOUR_NAMES), size=num), objects=objects, geometry=geometry)


@dataclass(frozen=True, kw_only=True)
class SceneTensors:
    """What `compose` needs of scenes, on a device; rows are scenes."""

    colour: Tensor
    objects: Tensor
    geometry: Tensor

    @classmethod
    def of(cls, scenes: SceneArrays, device: torch.device | str) -> SceneTensors:
        return cls(**{field: torch.from_numpy(getattr(scenes, field)).to(device) for field in ("colour", "objects", "geometry")})

    def __getitem__(self, rows: Tensor | slice) -> SceneTensors:
        return SceneTensors(colour=self.colour[rows], objects=self.objects[rows], geometry=self.geometry[rows])


def palette(device: torch.device | str) -> Tensor:
    """(10, 3) fp32, 0 to 1: the background colours in the order of COLOUR_NAMES."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255


def compose(scenes: SceneTensors, sprites: Tensor, *, width: int, height: int, colours: Tensor) -> Tensor:
    """Pictures of scenes, (n, 3, height, width) fp32, -1 to 1. sprites: (S, 4, 128, 128) premultiplied; colours: `palette`.

    No reading back to the host, so it can be part of a captured CUDA graph.
    """
    device = sprites.device
    x = (torch.arange(width, device=device) + 0.5)[None, None, :]
    y = (torch.arange(height, device=device) + 0.5)[None, :, None]
    picture = colours[scenes.colour][:, :, None, None]
    for place in range(PLACES):
        index = scenes.objects[:, place]
        centre_x, centre_y, size, angle = (part[:, None, None] for part in scenes.geometry[:, place].unbind(-1))
        half = size * (min(width, height) / 2)
        dx, dy = x - centre_x * width, y - centre_y * height
        cos, sin = angle.cos() / half, angle.sin() / half
        grid = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], dim=-1)
        layer = F.grid_sample(sprites[index.clamp(min=0)].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        layer = layer * (index >= 0)[:, None, None, None]
        picture = layer[:, :3] + picture * (1 - layer[:, 3:])
    return picture * 2 - 1


def held_out_pictures(sprites: Tensor, num: int, num_objects: int, size: tuple[int, int], *, batch: int = 32) -> list[Tensor]:
    """Scenes of every kind, of a seed that nothing is trained on: for measuring autoencoders. size: width, height in px.

    Returns batches (B, 3, height, width) fp32, -1 to 1. sprites, num_objects: see compose and draw_scenes.
    """
    width, height = size
    scenes = SceneTensors.of(draw_scenes(num, seed=HELD_OUT_SEED, num_objects=num_objects, aspect=width / height), sprites.device)
    parts = [scenes[start : start + batch] for start in range(0, num, batch)]
    return [compose(part, sprites, width=width, height=height, colours=palette(sprites.device)) for part in parts]
