"""A picture grid for people: what the reference draws, what the bundle draws from the same seeds, and where they differ."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw

from engines.bundle_writer import write_bundle
from engines.manifest import BundleInfo
from runtime.engine import SanaEngine
from runtime.prompt import PromptCutWarning
from sana_ref.checkpoint import Checkpoint
from sana_ref.pipeline import SanaReference

__all__ = ["draw_grid"]

PICTURES = (("a red apple on a yellow background", 0), ("a cat on a blue background", 1), ("a rocket on a white background", 2))
AMPLIFIED = 16  # differences of a few of 255 levels are invisible otherwise
_LABEL_PX, _GAP_PX = 16, 4


def draw_grid(checkpoint: Checkpoint, info: BundleInfo, files: Mapping[str, Path], folder: Path) -> Image.Image:
    """A row for each prompt: the fp32 reference, the bundle's portable graphs, and AMPLIFIED times their difference.

    info, files: of the bundle, which is put together in `folder` for the time of drawing.
    """
    side = info.ranges.opt_side
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCutWarning)  # both sides cut alike
        reference = SanaReference(checkpoint, dtype=torch.float32)
        expected = [reference.generate(prompt, seed=seed, width=side, height=side)[0] for prompt, seed in PICTURES]
        del reference
        with write_bundle(folder / "bundle") as writer:
            for name, source in files.items():
                writer.add(source, name)
            bundle = writer.finish(info.model_copy(update={"targets": (), "tensorrt": None}))
        with SanaEngine(bundle, backend="onnxruntime", verify=False, progress=False) as engine:
            got = [engine.generate(prompt, seed=seed, width=side, height=side)[0] for prompt, seed in PICTURES]
    shutil.rmtree(bundle.path)
    return _compose(list(zip(expected, got, strict=True)), [f"{prompt} (seed {seed})" for prompt, seed in PICTURES])


def _compose(rows: list[tuple[Image.Image, Image.Image]], titles: list[str]) -> Image.Image:
    width, height = rows[0][0].size
    row_height = 2 * _LABEL_PX + height + _GAP_PX
    grid = Image.new("RGB", (3 * width + 2 * _GAP_PX, row_height * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for index, ((expected, got), title) in enumerate(zip(rows, titles, strict=True)):
        difference = ImageChops.difference(expected.convert("RGB"), got.convert("RGB"))
        most = int(np.asarray(difference).max())
        labels = ("PyTorch fp32", "ONNX Runtime", f"difference x {AMPLIFIED}, max {most}")
        top = index * row_height
        draw.text((0, top), title, fill="black")
        for column, (picture, label) in enumerate(zip((expected, got, difference.point(_amplify)), labels, strict=True)):
            left = column * (width + _GAP_PX)
            draw.text((left, top + _LABEL_PX), label, fill="black")
            grid.paste(picture, (left, top + 2 * _LABEL_PX))
    return grid


def _amplify(level: int) -> int:
    return min(255, AMPLIFIED * level)
