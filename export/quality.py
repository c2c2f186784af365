"""How far the pictures of one painter are from those of another: the quality section of parity.json, and the page beside it.

A painter draws a picture for each prompt; the seed of the next is one more. Two bundles are painters, and so is the reference.
"""

from __future__ import annotations

import heapq
import io
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops

from engines.bundle_writer import write_bundle
from engines.manifest import BundleInfo
from engines.quality_report import PAGE_NAME, Against, PictureRow, QualityReport, SceneScores, page
from export.metrics.pictures import Likeness, estimate, likeness
from runtime.engine import SanaEngine
from runtime.prompt import PromptCutWarning
from sana_ref.checkpoint import Checkpoint
from sana_ref.pipeline import SanaReference

__all__ = ["BUILD_PROMPTS", "ROWS", "Comparison", "Look", "Painter", "build_quality", "compare", "report"]

Painter = Callable[[list[str], int], list[Image.Image]]
Look = Callable[[Sequence[int], list[Image.Image], list[Image.Image]], None]  # indices of prompts, pictures of both

BUILD_PROMPTS = ("a red apple on a yellow background", "a cat on a blue background", "a rocket on a white background")
AMPLIFIED = 8  # differences of a few of 255 levels are invisible otherwise
CHUNK = 4  # pictures in one go
SHOWN_PX = 256  # longer side of the page's pictures: each at most 256 x 256 x 3 bytes, about 60 KB as a PNG
ROWS = 12


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A pair that is kept for the page."""

    prompt: str
    seed: int
    likeness: Likeness
    first: Image.Image
    second: Image.Image


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """psnr_db, ssim, lpips: (prompts, seeds). worst: by LPIPS, the worst first."""

    psnr_db: NDArray[np.float64]
    ssim: NDArray[np.float64]
    lpips: NDArray[np.float64]
    worst: Sequence[_Shown]


def compare(
    first: Painter,
    second: Painter,
    prompts: Sequence[str],
    *,
    num_seeds: int = 1,
    seed: int = 0,
    rows: int = ROWS,
    look: Look | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Both draw `num_seeds` pictures of each prompt, each from a seed of its own, from `seed` on.

    look: sees all pictures as they are drawn, for a judge. advance: called with the pairs done. In memory are a few pictures and
    the `rows` worst pairs. Raises ParityError for pictures of unlike sizes.
    """
    found = {name: np.empty((len(prompts), num_seeds)) for name in ("psnr_db", "ssim", "lpips")}
    worst: list[tuple[float, int, _Shown]] = []  # a heap with the least bad on top
    for turn in range(num_seeds):
        for start in range(0, len(prompts), CHUNK):
            places = range(start, min(start + CHUNK, len(prompts)))
            texts, at = [prompts[place] for place in places], seed + turn * len(prompts) + start
            pictures = first(texts, at), second(texts, at)
            for place, pair, alike in zip(places, zip(*pictures, strict=True), likeness(*pictures), strict=True):
                for name, values in found.items():
                    values[place, turn] = getattr(alike, name)
                shown = _Shown(prompt=prompts[place], seed=at + place - start, likeness=alike, first=pair[0], second=pair[1])
                heapq.heappush(worst, (alike.lpips, -(turn * len(prompts) + place), shown))
                if len(worst) > rows:
                    heapq.heappop(worst)
            if look is not None:
                look(places, *pictures)
            advance(turn * len(prompts) + places[-1] + 1)
    return Comparison(**found, worst=[shown for _, _, shown in sorted(worst, key=lambda each: each[:2], reverse=True)])


def report(
    found: Comparison, *, against: Against, name: str, backend: str, scores: SceneScores | None = None
) -> tuple[QualityReport, dict[str, bytes]]:
    """The section, and the page's files by their name in a bundle."""
    files: dict[str, bytes] = {}
    rows = []
    for number, shown in enumerate(found.worst):
        difference = ImageChops.difference(shown.first.convert("RGB"), shown.second.convert("RGB")).point(_amplify)
        names = tuple(f"{number:03}-{which}.png" for which in ("first", "second", "difference"))
        for file, picture in zip(names, (shown.first, shown.second, difference), strict=True):
            files[str(Path(PAGE_NAME).with_name(file))] = _png(_small(picture))
        alike = shown.likeness
        rows.append(
            PictureRow(
                prompt=shown.prompt,
                seed=shown.seed,
                psnr_db=alike.psnr_db,
                ssim=alike.ssim,
                lpips=alike.lpips,
                pictures=(names[0], names[1], names[2]),
            )
        )
    section = QualityReport(
        against=against,
        name=name,
        backend=backend,
        prompts=found.lpips.shape[0],
        seeds=found.lpips.shape[1],
        psnr_db=estimate(found.psnr_db),
        ssim=estimate(found.ssim),
        lpips=estimate(found.lpips),
        scores=scores,
        amplified=AMPLIFIED,
        rows=tuple(rows),
    )
    return section, files | {PAGE_NAME: page(section).encode()}


def build_quality(
    checkpoint: Checkpoint, info: BundleInfo, files: Mapping[str, Path], folder: Path
) -> tuple[QualityReport, dict[str, bytes]]:
    """As `report`, of the bundle's portable graphs against the fp32 reference, for BUILD_PROMPTS.

    info, files: of the bundle, which is put together in `folder` for the time of drawing.
    """
    side = info.ranges.opt_side
    reference = SanaReference(checkpoint, dtype=torch.float32)
    with write_bundle(folder / "bundle") as writer:
        for name, source in files.items():
            writer.add(source, name)
        bundle = writer.finish(info.model_copy(update={"targets": (), "tensorrt": None}))
    with (
        SanaEngine(bundle, backend="onnxruntime", verify=False, progress=False) as engine,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", PromptCutWarning)  # both sides cut alike
        found = compare(
            lambda prompts, seed: [reference.generate(p, seed=seed + i, width=side, height=side)[0] for i, p in enumerate(prompts)],
            lambda prompts, seed: [engine.generate(p, seed=seed + i, width=side, height=side)[0] for i, p in enumerate(prompts)],
            BUILD_PROMPTS,
        )
    shutil.rmtree(bundle.path)
    against = Against(kind="reference", name="PyTorch fp32", digest=checkpoint.digest)
    return report(found, against=against, name=info.precision["denoiser"], backend="ONNX Runtime on the CPU")


def _amplify(level: int) -> int:
    return min(255, AMPLIFIED * level)


def _small(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((SHOWN_PX, SHOWN_PX))
    return small


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()
