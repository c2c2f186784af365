"""A plan of a quantization out of a checkpoint and a recipe: runs are drawn, activations observed, scales and corrections chosen.

    plan = make_plan(checkpoints.load("models/sana-tiny"), load_recipe("nvfp4"))

The equation of a layer and its sources are in sana_ref/quantization.py. The same checkpoint, recipe, prompts, code and kind of
machine give the same plan, bit for bit; what was done before is read from the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import CheckpointError, SpecError
from engines.store import Store, digest_of
from export.calibration import OBSERVERS, Statistics, observe
from export.calibration_data import draw_all, plan_runs
from export.calibration_report import LayerReport, write_report
from export.calibrators import check_version, largest_for_scale
from export.fingerprint import code
from export.progress import Progress
from export.recipe import Recipe
from sana_ref.checkpoint import Checkpoint
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import Format, LayerPlan, QuantizationPlan, groups_of, load_plan, save_plan
from sana_ref.quantize_ops import BLOCK, finite_range, round_nvfp4, round_static
from sana_ref.quantized import quantize_layer, static_scale

__all__ = ["PLAN", "PLANNERS", "calibrate", "check_weights", "make_plan", "plan_groups", "plan_layer", "smoothing"]

PLAN = "plan.safetensors"
PLANNERS = (*OBSERVERS, "export/calibrators.py", "export/quantization_plan.py", "export/calibration_report.py", "export/recipe.py")
_LEAST = 1e-5  # of the largest: what a channel that is nearly always zero counts as, so that its factor stays finite


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> QuantizationPlan:
    """What `recipe` makes of `checkpoint`. Raises SpecError, CheckpointError and what plan_runs raises."""
    return load_plan(calibrate(checkpoint, recipe, store=store, progress=progress, device=device) / PLAN)


def calibrate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Path:
    """As make_plan; the folder with the plan and the report: plan.safetensors, calibration.json, calibration.html."""
    store, progress = store or Store(), progress or Progress()
    check_version()
    groups = groups_of(checkpoint.sources["transformer"].shapes)
    formats = recipe.formats_of(list(groups))
    _check_shapes(checkpoint, recipe, formats)
    specs = plan_runs(checkpoint, recipe.calibration)
    runs = [spec.key(checkpoint, torch.float32, device) for spec in specs]
    key = digest_of(
        {
            "stage": "quantization plan",
            "runs": runs,
            "recipe": _content(recipe),
            "code": code(PLANNERS),
            "modelopt": check_version(),
        }
    )

    def make(folder: Path) -> None:
        reference = SanaReference(checkpoint, device=device)
        check_weights(reference.denoiser.transformer, formats)
        drawn = draw_all(reference, specs, store, progress)
        statistics = observe(reference, drawn, rows=recipe.calibration.rows, store=store, progress=progress)
        with progress.stage("calibration: scales") as stage:
            plan, reports = plan_groups(reference.denoiser.transformer, recipe, formats, statistics)
            stage.note(f"{len(plan.layers)} groups of layers quantized, {len(formats) - len(plan.layers)} kept")
        notes = {
            "checkpoint": checkpoint.digest,
            "recipe": recipe.model_dump_json(),
            "runs": digest_of(runs),
            "modelopt": check_version(),
        }
        save_plan(plan.model_copy(update={"notes": notes}), folder / PLAN)
        write_report(folder, reports, notes)

    return store.get_or_make(key, make)


def _content(recipe: Recipe) -> dict[str, object]:
    """What of a recipe decides the plan beside the runs: neither the name of the file of prompts nor anything of the text's."""
    of_text = [name for name in Recipe.model_fields if name.startswith("text_")]
    return recipe.model_dump(mode="json", exclude={"calibration": {"prompts"}, **dict.fromkeys(of_text, True)})


def _check_shapes(checkpoint: Checkpoint, recipe: Recipe, formats: dict[str, Format]) -> None:
    shapes = checkpoint.sources["transformer"].shapes
    for group, names in groups_of(shapes).items():
        depth = shapes[names[0]][1]
        if formats[group] == "nvfp4" and depth % BLOCK:
            raise SpecError(
                f"{group}: got nvfp4 for a depth of {depth}; expected a multiple of {BLOCK}, which share a scale. "
                f"Keep this group precise (keep: [{group}]), or give it fp8."
            )
        _check_rank(recipe, group, formats[group], (sum(shapes[name][0] for name in names), depth))


def _check_rank(recipe: Recipe, group: str, kind: Format, shape: tuple[int, ...]) -> None:
    """shape: of the group's weight, (columns, depth)."""
    if kind == "nvfp4" and recipe.low_rank > min(shape):
        raise SpecError(f"low_rank: got {recipe.low_rank} for {group}, whose weight is {shape}; expected at most its sides.")


def check_weights(transformer: nn.Module, formats: Mapping[str, Format]) -> None:
    """Raises CheckpointError naming a weight that is not finite, or all zeros and to be quantized.

    Before anything is run: what goes through such a layer is as bad in those behind it, and the first of them would be named.
    """
    parameters = {name: parameter.detach() for name, parameter in transformer.named_parameters()}
    for name, parameter in parameters.items():
        least, most = (float(x) for x in parameter.aminmax())  # NaN if any is
        if not math.isfinite(most - least):
            raise CheckpointError(
                f"{name}: got NaN or infinity in a weight; expected finite numbers. Mend the checkpoint: all layers "
                "behind it would get them, quantized or not."
            )
    for group, names in groups_of(parameters).items():
        if formats[group] != "none":
            finite_range(torch.stack([parameters[name].abs().amax() for name in names]), f"{group}.weight")


def plan_groups(
    transformer: nn.Module, recipe: Recipe, formats: Mapping[str, Format], statistics: Statistics
) -> tuple[QuantizationPlan, list[LayerReport]]:
    """Scales and corrections of every group whose format is not none, and what was seen of all."""
    parameters = dict(transformer.named_parameters())
    layers: dict[str, LayerPlan] = {}
    tensors: dict[str, Tensor] = {}
    reports = []
    for group, names in groups_of(parameters).items():
        steps = statistics.steps(group)
        channels = statistics.channels(group, needed=formats[group] != "none")
        made = None
        if formats[group] != "none":
            weight = torch.cat([parameters[name].detach().flatten(1) for name in names]).float()
            rows = statistics.rows(group).to(weight.device)
            made = plan_layer(group, formats[group], recipe, weight, channels.to(weight.device), rows)
            layers[group] = made.layer
            tensors |= {f"{group}.{suffix}": tensor.cpu() for suffix, tensor in made.tensors.items()}
        reports.append(
            LayerReport(
                group=group,
                format=formats[group],
                largest=float(channels.amax()),
                ranges=[float(value) for value in steps.amax((0, 2))],
                input_scale=None if made is None else made.layer.input_scale,
                exponent=None if made is None else made.exponent,
                error=None if made is None else made.error,
            )
        )
    return QuantizationPlan(layers=layers, tensors=tensors), reports


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """exponent: of the smoothing, if any. error: of the layer's result on the kept rows, squared, of the result's own square."""

    layer: LayerPlan
    tensors: dict[str, Tensor]
    exponent: float | None
    error: float


def plan_layer(group: str, kind: Format, recipe: Recipe, weight: Tensor, channels: Tensor, rows: Tensor) -> PlannedLayer:
    """Scales and corrections of one group.

    weight: (columns, depth) fp32. channels: (depth,) fp32, the largest absolute activation of each. rows: (n, depth) fp32, tokens.
    With `awq` every exponent is tried, with all else that the recipe asks for, and the least error of the layer's result is kept.
    """
    finite_range(weight, f"{group}.weight")
    _check_rank(recipe, group, kind, tuple(weight.shape))
    exact = F.linear(rows, weight)
    choices: list[tuple[float | None, Tensor | None]] = [(None, None)]
    if recipe.smoothquant is not None:
        choices = [(recipe.smoothquant, smoothing(channels, recipe.smoothquant, weight.abs().amax(0)))]
    elif recipe.awq is not None:
        size = rows.abs().mean(0)
        choices = [(exponent, smoothing(size, exponent) if exponent else None) for exponent in recipe.awq]
    tried = [_with_smoothing(group, kind, recipe, weight, channels, rows, exact, exponent, smooth) for exponent, smooth in choices]
    return min(tried, key=lambda made: made.error)  # the first of equals


def _with_smoothing(
    group: str,
    kind: Format,
    recipe: Recipe,
    weight: Tensor,
    channels: Tensor,
    rows: Tensor,
    exact: Tensor,
    exponent: float | None,
    smooth: Tensor | None,
) -> PlannedLayer:
    tensors = {} if smooth is None else {"smooth": smooth}
    factor = torch.ones_like(channels) if smooth is None else smooth
    if recipe.low_rank and kind == "nvfp4":
        tensors["low_rank_up"], tensors["low_rank_down"] = low_rank(weight * factor, recipe.low_rank)
    scale = None
    if kind == "nvfp4" or recipe.activations == "static":
        largest = largest_for_scale(recipe.method, channels / factor, rows / factor, _rounding(kind), percentile=recipe.percentile)
        finite_range(torch.tensor(largest), f"{group}, activations")
        scale = static_scale(kind, largest)
    layer = LayerPlan(format=kind, input_scale=scale)
    plan = QuantizationPlan(layers={group: layer}, tensors={f"{group}.{suffix}": tensor for suffix, tensor in tensors.items()})
    got = quantize_layer(plan, group, weight).product(rows, slice(None), None)
    error = float((got - exact).double().square().sum() / exact.double().square().sum().clamp(min=1e-300))
    return PlannedLayer(layer=layer, tensors=tensors, exponent=exponent, error=error)


def smoothing(activations: Tensor, exponent: float, weights: Tensor | None = None) -> Tensor:
    """(depth,) fp32: s_j = activations_j^exponent / weights_j^(1 - exponent), without weights s_j = activations_j^exponent.

    activations, weights: (depth,), the sizes of the channels. Divided by its geometric mean, which changes nothing in exact numbers
    and keeps 16-bit activations in range. Sources: SmoothQuant, arXiv 2211.10438, equation 4; AWQ, arXiv 2306.00978, equation 5.
    """
    logs = exponent * _log(activations)
    if weights is not None:
        logs = logs - (1 - exponent) * _log(weights)
    return (logs - logs.mean()).exp().float()


def _log(sizes: Tensor) -> Tensor:
    wide = sizes.double()
    return wide.clamp(min=float(wide.amax()) * _LEAST).log()


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `weight` of that rank, as up (columns, rank) @ down (rank, depth), of about the same size.

    Source: SVDQuant, arXiv 2411.05007, section 4.2.
    """
    up, singular, down = torch.linalg.svd(weight, full_matrices=False)
    root = singular[:rank].sqrt()
    return (up[:, :rank] * root).contiguous(), (root[:, None] * down[:rank]).contiguous()


def _rounding(kind: Format) -> Callable[[Tensor, float], Tensor]:
    def round_to(x: Tensor, largest: float) -> Tensor:
        scale = static_scale(kind, largest)
        if kind == "nvfp4":
            return round_nvfp4(x, scale)
        assert kind != "none"
        return round_static(x, kind, scale)

    return round_to
