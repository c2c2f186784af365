"""What a calibration looks at: latents of real sampling runs of the reference, before each step and after the last.

Each prompt is one run and one entry of the store, so a calibration that was killed goes on where it was, and one with more prompts
reuses those that were drawn. A run depends on nothing but its own prompt, seed and size: it is drawn in a batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.errors import SpecError
from engines.store import Store, digest_of
from export.calibration_prompts import prompts_file, read_prompts
from export.fingerprint import code, versions
from export.progress import Pace, Progress
from export.recipe import CalibrationSettings
from runtime.noise import normal_batch
from runtime.schedule import Schedule
from sana_ref.checkpoint import Checkpoint
from sana_ref.pipeline import SanaReference, TextBatch

__all__ = ["Run", "RunSpec", "default_sizes", "draw", "draw_all", "plan_runs", "start_noise"]

SOURCES = ("sana_ref/*.py", "runtime/noise.py", "runtime/schedule.py", "runtime/prompt.py", "export/calibration_data.py")
_FILE = "latents.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One picture to draw. width, height: px."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float

    def key(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> str:
        """What its results are kept by: everything that decides them."""
        return digest_of(
            {
                "stage": "calibration run",
                "checkpoint": checkpoint.digest,
                "run": [self.prompt, self.seed, self.width, self.height, self.steps, self.guidance],
                "arithmetic": [str(dtype), torch.device(device).type],
                "code": code(SOURCES),
                "versions": versions(),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """latents: (steps + 1, C, h, w) fp32: before each step, and the result."""

    spec: RunSpec
    key: str
    latents: Tensor


def default_sizes(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    """(width, height) in px: what the model was trained for, and oblong ones of 5 : 3 and about the same area."""
    px = checkpoint.vae_config.px_per_latent
    cells = checkpoint.transformer_config.sample_size
    wide, narrow = max(1, round(cells * 1.25)), max(1, round(cells * 0.75))
    return tuple((w * px, h * px) for w, h in ((cells, cells), (wide, narrow), (narrow, wide)))


def plan_runs(checkpoint: Checkpoint, settings: CalibrationSettings) -> tuple[RunSpec, ...]:
    """One run a prompt; sizes take turns. Raises SpecError for prompts that are missing or fewer than asked, and wrong sizes."""
    prompts = read_prompts(prompts_file(settings.prompts, checkpoint.folder), settings.num_prompts)
    px = checkpoint.vae_config.px_per_latent
    sizes = settings.sizes if settings.sizes is not None else default_sizes(checkpoint)
    if not sizes:
        raise SpecError("calibration.sizes: got none; expected [[width, height], …] in px, or null for the checkpoint's.")
    for width, height in sizes:
        if min(width, height) < px or width % px or height % px:
            raise SpecError(f"calibration.sizes: got {width} x {height} px; expected multiples of {px}.")
    sampler = checkpoint.sampler
    return tuple(
        RunSpec(
            prompt=prompt,
            seed=settings.seed + number,
            width=sizes[number % len(sizes)][0],
            height=sizes[number % len(sizes)][1],
            steps=sampler.num_steps if settings.steps is None else settings.steps,
            guidance=sampler.guidance_scale,
        )
        for number, prompt in enumerate(prompts)
    )


def start_noise(reference: SanaReference, spec: RunSpec, stream: int = 0) -> Tensor:
    """(1, C, h, w) fp32, standard normal. stream: 0 is where sampling starts, i + 1 the fresh noise of step i."""
    shape = (reference.checkpoint.transformer_config.in_channels, *reference.latent_size(spec.width, spec.height))
    return torch.from_numpy(normal_batch([spec.seed], shape, stream=stream))


def draw(reference: SanaReference, spec: RunSpec, text: TextBatch | None = None) -> Tensor:
    """The latents of a run, (steps + 1, C, h, w) fp32 on the CPU. text: if it is encoded already."""
    schedule: Schedule = reference.schedule(None, spec.steps)
    noise = start_noise(reference, spec)
    seen = [noise * schedule.initial_scale]
    reference.sample(
        reference.encode_text([spec.prompt], "", spec.guidance) if text is None else text,
        schedule,
        latents=noise,
        guidance=spec.guidance,
        noise=lambda step: start_noise(reference, spec, step + 1),
        on_step=lambda step, steps, latents: seen.append(latents.cpu()),
    )
    return torch.cat(seen)


def draw_all(reference: SanaReference, specs: Sequence[RunSpec], store: Store, progress: Progress) -> list[Run]:
    """Draw every run, or read what was drawn before."""
    dtype, device = reference.denoiser.transformer.proj_out.weight.dtype, str(reference.device)
    runs, drawn = [], 0
    with progress.stage("calibration: sampling runs") as stage:
        pace = Pace(progress, "sampling runs")
        for number, spec in enumerate(specs, 1):
            key = spec.key(reference.checkpoint, dtype, device)

            def make(folder: Path, spec: RunSpec = spec, left: int = len(specs) - number) -> None:
                nonlocal drawn
                drawn += 1
                with pace.piece(left):
                    save_file({"latents": draw(reference, spec).contiguous()}, folder / _FILE)

            folder = store.get_or_make(key, make)
            runs.append(Run(spec=spec, key=key, latents=load_file(folder / _FILE)["latents"]))
        stage.cached = not drawn
        stage.note(f"{len(specs)} prompts, {len(specs) - drawn} of them from the cache")
    return runs
