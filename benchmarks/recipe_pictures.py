"""Pictures of quantized pipelines, simulated in PyTorch, each an entry of the cache: a run that is stopped goes on where it was.

    pictures = draw_all(checkpoint, [Job(candidate=…, text=…, seed=…), …], store, progress)

What a bundle computes on a GPU: the denoiser in fp16, text encoder and decoder in bf16, products summed in fp32
(benchmarks/half_products.py), and what the candidate quantizes. FP32 is the reference itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from benchmarks.half_products import HalfProducts
from benchmarks.peer_recipes import FP32, Candidate
from benchmarks.text_weights import quantize
from engines.store import Store, digest_of
from export.fingerprint import code, versions
from export.progress import Pace, Progress
from export.weight_only import Weights
from sana_ref.checkpoint import Checkpoint
from sana_ref.pipeline import SanaReference

__all__ = ["Job", "Key", "Painter", "draw_all"]

Key = tuple[str, str, int]  # name of the candidate, caption, seed
SOURCES = (
    "sana_ref/*.py",
    "runtime/noise.py",
    "runtime/schedule.py",
    "runtime/prompt.py",
    "benchmarks/half_products.py",
    "benchmarks/peer_recipes.py",
    "benchmarks/recipe_pictures.py",
    "benchmarks/text_weights.py",
)


class Job(NamedTuple):
    """One picture."""

    candidate: Candidate
    text: str
    seed: int

    @property
    def key(self) -> Key:
        return self.candidate.name, self.text, self.seed


@dataclass
class Painter:
    """Networks are loaded when a picture needs them, once for all candidates with the same weights of the text's components."""

    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        self._half: dict[tuple[tuple[str, str], ...], SanaReference] = {}
        self._products = HalfProducts()

    @cached_property
    def exact(self) -> SanaReference:
        return SanaReference(self.checkpoint)

    def half(self, weights: Weights) -> SanaReference:
        key = tuple(sorted(weights.items()))
        if key not in self._half:
            made = SanaReference(self.checkpoint, dtype=torch.float16)
            quantize(made, weights)
            self._half[key] = made
        return self._half[key]

    def draw(self, job: Job) -> Image.Image:
        if job.candidate.format == FP32:
            return self.exact.generate(job.text, seed=job.seed)[0]
        reference = self.half(job.candidate.weights)
        with self._products, job.candidate.products(reference.denoiser.transformer):
            return reference.generate(job.text, seed=job.seed)[0]


def draw_all(checkpoint: Checkpoint, jobs: Sequence[Job], store: Store, progress: Progress) -> dict[Key, Image.Image]:
    """Drawn in the order of the jobs."""
    painter, found = Painter(checkpoint), {}
    shared = {"stage": "picture of a pipeline", "checkpoint": checkpoint.digest, "code": code(SOURCES), "versions": versions()}
    with progress.stage("pictures"):
        pace = Pace(progress, "pictures")
        for number, job in enumerate(jobs, 1):

            def make(folder: Path, job: Job = job, left: int = len(jobs) - number) -> None:
                with pace.piece(left):
                    painter.draw(job).save(folder / "picture.png")

            key = {**shared, "candidate": job.candidate.digest, "caption": job.text, "seed": job.seed}
            with Image.open(store.get_or_make(digest_of(key), make) / "picture.png") as file:
                found[job.key] = file.convert("RGB")
    return found
