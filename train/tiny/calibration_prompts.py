"""Captions that a quantization of sana-tiny is calibrated on: of the grammar, of combinations that training may see.

python -m train.tiny.calibration_prompts > models/sana-tiny/calibration_prompts.txt     # needs the package emoji
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from train.tiny.captions import Names, caption
from train.tiny.emoji_list import CLASSES
from train.tiny.prepare_sprites import names_of
from train.tiny.scenes import HeldOut, draw_scenes

__all__ = ["NUM", "SEED", "calibration_captions"]

NUM = 64
SEED = 431  # apart from those of training's scenes and of held-out questions


def calibration_captions(names: Sequence[Names], num: int = NUM) -> list[str]:
    """`num` different captions. names: of the classes, in their order."""
    scenes = draw_scenes(4 * num, seed=SEED, num_objects=len(names), without=HeldOut.of([entry["en"][0] for entry in names]))
    rng = np.random.Generator(np.random.Philox(SEED))
    captions = (caption(scenes.scene(number), list(names), rng) for number in range(len(scenes)))
    return list(dict.fromkeys(captions))[:num]


if __name__ == "__main__":
    sys.stdout.write("\n".join(calibration_captions([names_of(*entry) for entry in CLASSES])) + "\n")
