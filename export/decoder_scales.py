"""Scales of the decoder's INT8 convolutions from pictures: the latents that a calibration's sampling runs end in, decoded in fp32.

What is largest in pictures differs from layer to layer, in sana-tiny's from 1.8 to 4.4 times the parity check's noise, and INT8
loses a bit where a scale leaves twice the room. The recipe's method finds the scale, as it does the denoiser's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from engines.digest import digest_of
from export.calibration_data import draw_all, plan_runs
from export.calibrators import check_version, largest_for_scale
from export.fingerprint import code
from export.quantization_request import QuantizationRequest
from export.recipe import Recipe
from export.stages import Runner
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import QuantizationPlan, load_plan, save_plan
from sana_ref.quantize_ops import Rows, finite_range, round_static
from sana_ref.quantized import static_scale, uniform_plan
from sana_ref.quantized_convs import Convs

__all__ = ["ConvStatistics", "calibrated_convs"]

_PLAN = "plan.safetensors"
_SOURCES = ("sana_ref/*.py", "export/decoder_scales.py", "export/calibrators.py")


class ConvStatistics(Convs):
    """Inside `with ConvStatistics(decoder, rows) as seen:` notes the inputs of each group, (B, C, h, w): of a `Decoder`.

    channels: by group, (C,) fp32, each one's largest absolute value; pixels: a list of (rows, C) fp32, evenly spaced ones of a run.
    """

    def __init__(self, decoder: nn.Module, rows: int) -> None:
        super().__init__(decoder)
        self.rows = rows
        self.channels: dict[str, Tensor] = {}
        self.pixels: dict[str, list[Tensor]] = {}

    def operands(self, group: str, x: Tensor) -> None:
        pixels = x.movedim(1, -1).flatten(0, -2).float()
        largest = pixels.abs().amax(0)
        self.channels[group] = torch.maximum(largest, self.channels.get(group, largest))
        where = torch.linspace(0, len(pixels) - 1, min(self.rows, len(pixels)), device=x.device).long()
        self.pixels.setdefault(group, []).append(pixels[where])

    def plan(self, kind: Rows, recipe: Recipe) -> QuantizationPlan:
        """All groups, by the recipe's method. Raises CheckpointError for one whose range is zero or not finite."""
        scales = {}
        for group, channels in self.channels.items():

            def round_to(x: Tensor, largest: float) -> Tensor:
                return round_static(x, kind, static_scale(kind, largest))

            rows = torch.cat(self.pixels[group])
            largest = largest_for_scale(recipe.method, channels, rows, round_to, percentile=recipe.percentile)
            scales[group] = static_scale(kind, finite_range(torch.tensor(largest), f"{group}, activations"))
        return uniform_plan(kind, scales, scales)


def calibrated_convs(runner: Runner, asked: QuantizationRequest, kind: Rows) -> QuantizationPlan:
    """Of the decoder, by the recipe of `asked`. Its runs are those of the denoiser's calibration, which the store has then."""
    checkpoint, progress, recipe = runner.checkpoint, runner.progress, asked.recipe
    specs = plan_runs(checkpoint, recipe.calibration)
    key = digest_of(
        {
            "stage": "decoder scales",
            "kind": kind,
            "runs": [spec.key(checkpoint, torch.float32, asked.device) for spec in specs],
            "recipe": [recipe.method, recipe.percentile, recipe.calibration.rows],
            "code": code(_SOURCES),
            "modelopt": check_version(),
        }
    )

    def make(folder: Path) -> None:
        reference = SanaReference(checkpoint, device=asked.device)
        drawn = draw_all(reference, specs, runner.store, progress)
        with progress.stage("calibration: decoder") as stage:
            with ConvStatistics(reference.decoder, recipe.calibration.rows) as seen:
                for run in drawn:
                    reference.decode(run.latents[-1:].to(reference.device))
            save_plan(seen.plan(kind, recipe), folder / _PLAN)
            stage.note(f"{len(seen.channels)} groups of convolutions, {len(drawn)} pictures")

    return load_plan(runner.store.get_or_make(key, make) / _PLAN)
