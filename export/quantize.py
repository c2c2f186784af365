"""The quantization of a build's denoiser that a calibration makes: by the recipe that was asked for, or one chosen for a budget.

Nothing is compiled here. What was done before is read from the store; a build that was killed goes on at the run where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from engines.errors import SpecError
from engines.quantization_report import Method, QuantizationReport
from engines.spec import Precision, Target, check_precision
from engines.store import Store
from export.budgeted import choose_for
from export.calibration_data import plan_runs
from export.calibrators import check_version
from export.plans import for_cublas, is_cublas
from export.progress import Progress
from export.quantization_plan import PLAN, calibrate
from export.quantization_request import QuantizationRequest
from export.recipe import Recipe
from export.request import BuildRequest
from sana_ref.checkpoint import Checkpoint
from sana_ref.quantization import Format, QuantizationPlan, groups_of, load_plan
from sana_ref.variants import variant_of

__all__ = ["Quantized", "check_asked", "check_formats", "quantize", "report_of"]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """precision: of the denoiser, that of most of its groups. recipe: YAML, for the bundle; None: none was followed."""

    precision: Precision
    plan: QuantizationPlan
    report: QuantizationReport
    recipe: str | None


def quantize(
    request: BuildRequest, asked: QuantizationRequest, checkpoint: Checkpoint, store: Store, progress: Progress
) -> Quantized:
    """Calibrate, and choose formats if there is a budget. Raises SpecError for what cannot be, before anything is drawn."""
    asked = asked.of_variant(variant_of(checkpoint.transformer_config))
    groups = list(groups_of(checkpoint.sources["transformer"].shapes))
    recipe = asked.recipe
    if asked.budget is None:
        formats = recipe.formats_of(groups)
        _check(asked.name, formats, request.targets)
    else:
        recipe.formats_of(groups)  # its patterns
        formats = dict.fromkeys(groups, asked.offered[0])
    cublas = is_cublas(replace(request, precision=_precision(formats)))
    recipe = _for_cublas(recipe, progress) if cublas else recipe
    _check_activations(asked.name, recipe, formats, request.targets)
    check_version()
    specs = plan_runs(checkpoint, recipe.calibration)
    progress.say(
        f"  calibration by the recipe {asked.name}: {len(specs)} prompts, {specs[0].steps} steps each, on {asked.device}; "
        "--no-calibrate does without, --plan takes one that was made"
    )
    measured: Mapping[str, float] = {}
    if asked.budget is None:
        plan = _calibrated(checkpoint, recipe, store, progress, asked.device)
        text, shown = (_as_yaml(asked.name, each) for each in (recipe, _without_path(recipe)))
    else:
        chosen = choose_for(checkpoint, recipe, asked.offered, asked.budget, store=store, progress=progress, device=asked.device)
        plan, formats, measured = chosen.plan, dict(chosen.formats), chosen.measured
        text, shown = chosen.text(recipe), chosen.text(_without_path(recipe))
    if asked.recipe_out is not None:
        _write(asked.recipe_out, text)
        progress.say(f"  {asked.recipe_out}: the recipe")
    plan = for_cublas(plan) if cublas else plan
    report = QuantizationReport(
        method="calibration",
        recipe=asked.name,
        formats=_as_report(formats),
        prompts=len(specs),
        budget=None if asked.budget is None else str(asked.budget),
        measured=dict(measured),
    )
    return Quantized(precision=_precision(formats), plan=plan, report=report, recipe=shown)


def report_of(plan: QuantizationPlan, groups: Iterable[str], method: Method) -> QuantizationReport:
    """Of a build without a calibration of its own."""
    formats: dict[str, Format] = {group: plan.layers[group].format if group in plan.layers else "none" for group in groups}
    return QuantizationReport(method=method, recipe=None, formats=_as_report(formats), prompts=None, budget=None, measured={})


def check_asked(request: BuildRequest) -> None:
    """What can be known before the checkpoint is read: whether the targets have the formats. Raises SpecError."""
    asked = request.quantization
    if asked is None:
        check_precision(request.precision, request.targets)
    elif asked.budget is not None:
        check_formats(asked.offered, request.targets)
    elif not asked.recipe.formats:
        check_formats([asked.recipe.format], request.targets)


def check_formats(formats: Iterable[Format], targets: tuple[Target, ...]) -> None:
    """Raises SpecError if one of them, or all together, cannot be built for `targets`."""
    names = sorted(set(formats) - {"none"})
    for name in names:
        check_precision(Precision(name), targets)
    if "fp8" in names and len(names) > 1 and Target.SM90 in targets:
        raise SpecError(
            f"precision: got {' and '.join(names)} together for sm90; expected fp8 alone, or none of it: cuBLASLt multiplies it "
            "there. Take a recipe of one format."
        )


def _check(name: str, formats: Mapping[str, Format], targets: tuple[Target, ...]) -> None:
    if set(formats.values()) == {"none"}:
        raise SpecError(f"recipe {name}: got no group that is quantised; expected one or more. Use --precision fp16.")
    for kind in sorted(set(formats.values())):
        group = next(group for group, each in formats.items() if each == kind)
        try:
            check_formats([kind], targets)
        except SpecError as error:
            raise SpecError(f"recipe {name}, {group}: {error}") from None
    check_formats(formats.values(), targets)


def _check_activations(name: str, recipe: Recipe, formats: Mapping[str, Format], targets: tuple[Target, ...]) -> None:
    if recipe.activations == "dynamic" and targets and {"int8", "fp8"} & set(formats.values()):
        raise SpecError(
            f"recipe {name}, activations: got dynamic for {', '.join(targets)}; expected static: TensorRT quantises activations "
            "with a scale that is fixed in the engine. Set activations=static, or use --target onnx."
        )


def _for_cublas(recipe: Recipe, progress: Progress) -> Recipe:
    progress.say(
        "  fp8 on sm90 is cuBLASLt's: a scale of the calibration where a kernel takes one (after attention and the depth-wise "
        "convolution), each token's own elsewhere"
    )
    if recipe.smoothquant is None and recipe.awq is None and recipe.activations == "static":
        return recipe
    progress.say("  the recipe's smoothing and dynamic activations do not apply there, and are left out")
    return recipe.model_copy(update={"smoothquant": None, "awq": None, "activations": "static"})


def _calibrated(checkpoint: Checkpoint, recipe: Recipe, store: Store, progress: Progress, device: str) -> QuantizationPlan:
    before = len(progress.stages)
    folder = calibrate(checkpoint, recipe, store=store, progress=progress, device=device)
    if len(progress.stages) == before:  # all of it is in the store
        with progress.stage("calibration") as stage:
            stage.cached = True
    progress.say(f"  what was seen, layer by layer: {folder / 'calibration.html'}")
    return load_plan(folder / PLAN)


def _precision(formats: Mapping[str, Format]) -> Precision:
    """Of most groups, of those that are quantised; of equals the smaller."""
    kinds = [kind for kind in formats.values() if kind != "none"]
    order = [str(kind) for kind in ("nvfp4", "fp8", "int8") if kind in kinds]
    return Precision(max(order, key=[*map(str, kinds)].count))  # the first of equals


def _as_report(formats: Mapping[str, Format]) -> dict[str, Precision | Literal["none"]]:
    return {group: "none" if kind == "none" else Precision(kind) for group, kind in formats.items()}


def _without_path(recipe: Recipe) -> Recipe:
    """A bundle does not say where its maker keeps prompts."""
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"prompts": None})})


def _as_yaml(name: str, recipe: Recipe) -> str:
    return f"# {name}, with all its keys.\n" + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
