"""What a build is asked for about the quantization of its denoiser: a recipe to calibrate by, or a plan, or neither.

precision, quantization = quantization_of(load("build", flags={"precision": "nvfp4"}))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engines.errors import SpecError
from engines.spec import QUANTIZED, Precision, nearest, parse_precision
from export.budget import Budget, parse_budget
from export.recipe import Recipe, load_recipe, name_for
from export.settings import BuildSettings
from export.weight_only import text_weights
from sana_ref.quantization import FORMATS, Format
from sana_ref.weight_only import TextFormat, TextPart

__all__ = ["QuantizationRequest", "quantization_of", "weights_of"]

# What else a group may be under a budget. INT8 and FP8 weights are as large; engines that mix them were not tested.
_OFFERED: dict[Format, tuple[Format, ...]] = {"none": (), "int8": ("int8",), "fp8": ("fp8",), "nvfp4": ("nvfp4", "fp8")}
_TEXT_KEYS = ("text_encoder=", "text_encoder_table=", "text_projection=")  # they mean something without a calibration too


@dataclass(frozen=True, kw_only=True)
class QuantizationRequest:
    """A calibration by `recipe`, whose name is `name`, on the device of PyTorch `device`.

    budget: the format of each group is chosen for it, out of `offered` and none. recipe_out: a YAML file for the recipe.
    """

    recipe: Recipe
    name: str
    device: str = "cpu"
    budget: Budget | None = None
    offered: tuple[Format, ...] = ()
    recipe_out: Path | None = None
    settings: BuildSettings | None = None  # of a recipe that ships by the name of a format; None: a file of one's own

    def of_variant(self, variant: str | None) -> QuantizationRequest:
        """By the recipe of this format that ships for a published variant; the same without one, for a budget, or for a file.

        A budget measures what such a recipe only expects, and starts from the format alone.
        """
        name = name_for(variant, self.name)
        if self.settings is None or self.budget is not None or name == self.name:
            return self
        return replace(self, recipe=_recipe(name, self.settings), name=name)


def quantization_of(settings: BuildSettings) -> tuple[Precision, QuantizationRequest | None]:
    """The precision, which for a recipe is that of most of its layers before its patterns are known, and what calibrates.

    None: nothing does, because the precision is not quantized, a plan is given, or none is wanted.
    Raises SpecError for words that do not go together, ConfigError for a recipe that is wrong.
    """
    word = settings.precision
    named = Precision(word) if word in set(Precision) else None
    asked = {
        "--budget": settings.budget,
        "--budget-formats": settings.budget_formats,
        "--calibration-prompts": settings.calibration_prompts,
        "--recipe-key": settings.recipe_keys or None,
        "--recipe-out": settings.recipe_out,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    if named is not None and named not in QUANTIZED:
        _refuse(given, f"--precision {named}", f"one of {', '.join(QUANTIZED)}, or a recipe")
        return named, None
    without = "--plan" if settings.plan is not None else None if settings.calibrate else "--no-calibrate"
    if without is not None:
        if named is None:
            given = {"--precision": word, **given}
        if not any(not key.startswith(_TEXT_KEYS) for key in settings.recipe_keys):
            given.pop("--recipe-key", None)
        _refuse(given, without, "a calibration, which it is for")
        return parse_precision(word), None
    recipe = _recipe(word, settings)
    budget = None if settings.budget is None else parse_budget(settings.budget)
    if budget is None and settings.budget_formats is not None:
        _refuse({"--budget-formats": settings.budget_formats}, "no --budget", "one, for which they are chosen")
    kinds: list[Format] = [kind for kind in (recipe.format, *(rule.format for rule in recipe.formats)) if kind != "none"]
    if not kinds:
        raise SpecError(
            f"precision: got the recipe {word}, which quantises nothing of the denoiser; expected a format. Use --precision fp16."
        )
    request = QuantizationRequest(
        recipe=recipe,
        name=Path(word).stem,
        device=_device(settings.device),
        budget=budget,
        offered=() if budget is None else _offered(settings.budget_formats, kinds[0]),
        recipe_out=settings.recipe_out,
        settings=settings if named is not None else None,
    )
    return Precision(kinds[0]), request


def _recipe(name: str, settings: BuildSettings) -> Recipe:
    recipe = load_recipe(name, list(settings.recipe_keys))
    if settings.calibration_prompts is None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"prompts": settings.calibration_prompts})
    return recipe.model_copy(update={"calibration": calibration})


def weights_of(settings: BuildSettings) -> dict[TextPart, TextFormat]:
    """The formats of the text's components that the recipe names. They hold without a calibration too (export/text_plans.py).

    Raises ConfigError for a recipe that is wrong.
    """
    word = settings.precision
    if word in set(Precision) and Precision(word) not in QUANTIZED:
        return {}
    return text_weights(load_recipe(word, list(settings.recipe_keys)))


def _refuse(given: Mapping[str, object], beside: str, expected: str) -> None:
    for option, value in given.items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise SpecError(f"{option.removeprefix('--')}: got {shown} with {beside}; expected {expected}. Leave one of them out.")


def _offered(words: tuple[str, ...] | None, kind: Format) -> tuple[Format, ...]:
    if words is None:
        return _OFFERED[kind]
    found: list[Format] = []
    for word in words:
        if word not in FORMATS[1:]:
            raise SpecError(f"budget-formats: got {word!r}; {nearest(word, FORMATS[1:])}.")
        found += [each for each in FORMATS if each == word and each not in found]
    return tuple(found)


def _device(word: str) -> str:
    there = torch.cuda.is_available()
    if word == "cuda" and not there:
        raise SpecError("device: got cuda, and PyTorch sees no GPU; expected one. Use --device cpu, or install PyTorch for CUDA.")
    return ("cuda" if there else "cpu") if word == "auto" else word
