"""The format of every group under a budget, from a checkpoint to a plan: calibrate, measure each group, choose, measure the whole.

    chosen = choose_for(checkpoint, load_recipe("nvfp4"), ("nvfp4", "fp8"), parse_budget("lpips<=0.08"), store=store, …)

Errors and pictures are of the simulation (sana_ref/quantized.py), against the fp32 reference's own runs from the same noise. Each
measurement is an entry of the store, so a choice that was killed, or is asked for with another budget, measures only what is new.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engines.errors import CheckpointError, SpecError
from engines.store import Store, digest_of
from export.budget import Budget
from export.calibration_data import SOURCES, Run, draw, draw_all, plan_runs
from export.choose_recipe import Chosen, Sizes, check_size, choose, combined, offers, recipe_text, sizes_of
from export.fingerprint import code
from export.progress import Progress
from export.quantization_plan import make_plan
from export.recipe import Recipe
from export.sensitivity import Table, measure
from runtime.image import to_images
from sana_ref.build import empty
from sana_ref.checkpoint import KINDS, Checkpoint
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import Format, QuantizationPlan, groups_of, plan_digest
from sana_ref.quantize_ops import BLOCK
from sana_ref.quantized import QuantizedLinears

__all__ = ["SENSITIVITY_RUNS", "WHOLE_RUNS", "ChosenPlan", "choose_for", "whole_cost"]

SENSITIVITY_RUNS = 2  # of those that calibrate, for each group and format
WHOLE_RUNS = 8  # for what is chosen
_FILE = "cost.json"


@dataclass(frozen=True, kw_only=True)
class ChosenPlan:
    """formats: of every group. measured: size, error and, under a budget of pictures, lpips and psnr_db."""

    plan: QuantizationPlan
    formats: Mapping[str, Format]
    measured: Mapping[str, float]
    _chosen: Chosen
    _sizes: Sizes
    _budget: Budget
    _model: str

    def text(self, recipe: Recipe) -> str:
        """The recipe as YAML, with a line for each decision."""
        return recipe_text(recipe, self._chosen, self._sizes, self._budget, self._model)


def choose_for(
    checkpoint: Checkpoint,
    recipe: Recipe,
    offered: Sequence[Format],
    budget: Budget,
    *,
    store: Store,
    progress: Progress,
    device: str,
    num_runs: int = SENSITIVITY_RUNS,
) -> ChosenPlan:
    """What `recipe` keeps precise stays so; its rules of other formats are not read: formats are chosen, of `offered` and none.

    Raises SpecError if the budget cannot be met, naming the groups that stand in the way.
    """
    shapes = checkpoint.sources["transformer"].shapes
    groups = groups_of(shapes)
    kept = {group for group, kind in recipe.model_copy(update={"formats": ()}).formats_of(list(groups)).items() if kind == "none"}
    if recipe.formats:
        progress.say("  the recipe's own formats are not read: the budget chooses them")
    thin = {group for group, names in groups.items() if shapes[names[0]][1] % BLOCK}
    precise = {kind: kept | thin if kind == "nvfp4" else kept for kind in offered}
    sizes, sides = sizes_of(empty(partial(KINDS["transformer"][2], checkpoint.transformer_config)))
    unmeasured: Table = {group: {kind: 0.0 for kind in offered if group not in precise[kind]} for group in groups}
    check_size(offers(unmeasured, sides, recipe), sizes, budget)  # shapes tell, before anything is drawn
    plans: dict[Format, QuantizationPlan] = {}
    for kind in offered:
        whole = recipe.model_copy(update={"format": kind, "keep": tuple(sorted(precise[kind])), "formats": ()})
        progress.say(f"  every group in {kind}:")
        plans[kind] = make_plan(checkpoint, whole, store=store, progress=progress, device=device)
    reference = SanaReference(checkpoint, dtype=torch.float32, device=device)
    runs = draw_all(reference, plan_runs(checkpoint, recipe.calibration)[:WHOLE_RUNS], store, progress)
    table = measure(reference, plans, runs[:num_runs], store=store, progress=progress)
    with progress.stage("choice of formats") as stage:

        def cost(formats: Mapping[str, Format]) -> dict[str, float]:
            plan = combined(plans, formats)
            return whole_cost(reference, plan, runs, pictures=budget.of_pictures, store=store)

        chosen = choose(offers(table, sides, recipe), sizes, budget, cost)
        formats = {group: choice.format for group, choice in chosen.allocation.items()}
        counts = {kind: list(formats.values()).count(kind) for kind in (*offered, "none")}
        stage.note(", ".join(f"{count} {'fp16' if kind == 'none' else kind}" for kind, count in counts.items() if count))
        stage.note(", ".join(f"{name} {value:.4g}" for name, value in sorted(chosen.measured.items())))
    if set(formats.values()) == {"none"}:
        raise SpecError(
            f"budget: {budget} is met only where nothing is quantised. In the way, by their error in {offered[0]}: "
            f"{_worst(table, offered[0])}. Allow more, or use --precision fp16."
        )
    return ChosenPlan(
        plan=combined(plans, formats),
        formats=formats,
        measured=chosen.measured,
        _chosen=chosen,
        _sizes=sizes,
        _budget=budget,
        _model=checkpoint.name,
    )


def whole_cost(
    reference: SanaReference, plan: QuantizationPlan, runs: Sequence[Run], *, pictures: bool, store: Store
) -> dict[str, float]:
    """Means over runs. error: |x - x_reference|^2 / |x_reference|^2 of the final latents x; with `pictures` also lpips, psnr_db.

    Raises CheckpointError for latents that are not finite.
    """
    from export.metrics.pictures import MOST_PSNR_DB, likeness

    if not plan.layers:  # the same run
        return {"error": 0.0} | ({"lpips": 0.0, "psnr_db": MOST_PSNR_DB} if pictures else {})

    def make(folder: Path) -> None:
        with QuantizedLinears(reference.denoiser.transformer, plan):
            finals = [draw(reference, run.spec)[-1:] for run in runs]
        found = {"error": _mean([_error(got, run.latents[-1:]) for got, run in zip(finals, runs, strict=True)])}
        if not math.isfinite(found["error"]):
            raise CheckpointError(
                f"got latents that are not finite with {len(plan.layers)} groups quantized; expected numbers. "
                "Keep more of them precise (keep in the recipe)."
            )
        if pictures:
            pairs = [
                likeness(_picture(reference, run.latents[-1:]), _picture(reference, got))[0]
                for got, run in zip(finals, runs, strict=True)
            ]
            found |= {"lpips": _mean([each.lpips for each in pairs]), "psnr_db": _mean([each.psnr_db for each in pairs])}
        (folder / _FILE).write_text(json.dumps(found), encoding="utf-8")

    key = digest_of(
        {
            "stage": "cost of a quantization",
            "plan": plan_digest(plan),
            "runs": [run.key for run in runs],
            "pictures": pictures,
            "code": code(
                (*SOURCES, "export/budgeted.py", "export/metrics/*.py", "export/metrics/*.safetensors", "runtime/image.py")
            ),
        }
    )
    found = json.loads((store.get_or_make(key, make) / _FILE).read_text(encoding="utf-8"))
    return {name: float(value) for name, value in found.items()}


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).square().sum() / exact.double().square().sum())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _picture(reference: SanaReference, latents: Tensor) -> list[Image.Image]:
    return to_images(reference.decode(latents.to(reference.device)).cpu().numpy())


def _worst(table: Mapping[str, Mapping[Format, float]], kind: Format) -> str:
    worst = sorted(table, key=lambda group: -table[group].get(kind, 0.0))[:5]
    return ", ".join(worst)
