"""A recipe of a quantization: the schema of configs/quantization/*.yaml, and which format each group of linear layers gets.

    recipe = load_recipe("int8")                    # configs/quantization/int8.yaml
    recipe = load_recipe("sana_1600m_1024px/int8")  # the same for a published variant (export/variant_recipes.py)
    recipe = load_recipe("recipes/mine.yaml", ["activations=static"])
    recipe.formats_of(groups)                       # {"transformer_blocks.0.attn1.to_qkv": "int8", …}

Nothing here imports PyTorch but through sana_ref.quantization, whose formats these are. Groups are named there too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engines.errors import ConfigError
from engines.spec import nearest
from runtime.config import compose, names_in_group, validate
from runtime.schedule import MAX_STEPS
from sana_ref.quantization import Format
from sana_ref.weight_only import HOST, WEIGHT_FORMATS, TableFormat, WeightFormat

__all__ = ["GROUP", "CalibrationSettings", "FormatRule", "Method", "Recipe", "load_recipe", "name_for"]

GROUP = "quantization"  # the folder of configs/
Method = Literal["absmax", "percentile", "mse"]
Exponent = Annotated[float, Field(ge=0, le=1)]


def _one_of(*words: str) -> BeforeValidator:
    def check(word: object) -> object:
        if word is not None and word not in words:
            raise ValueError(f"got {word!r}; {nearest(str(word), [*words, 'null'])}")
        return word

    return BeforeValidator(check)


WeightChoice = Annotated[WeightFormat | None, _one_of(*WEIGHT_FORMATS)]
EncoderChoice = Annotated[WeightFormat | Literal["w8a8"] | None, _one_of(*WEIGHT_FORMATS, "w8a8")]
TableChoice = Annotated[TableFormat | None, _one_of(*WEIGHT_FORMATS, HOST)]
_STRICT = ConfigDict(frozen=True, extra="forbid")


class CalibrationSettings(BaseModel):
    """What is drawn to see the activations."""

    model_config = _STRICT

    prompts: Path | None  # a text file, one a line; None: the checkpoint's own calibration_prompts.txt, else export's
    num_prompts: int = Field(ge=1, le=4096)
    steps: int | None = Field(ge=1, le=MAX_STEPS)  # None: the checkpoint's
    sizes: tuple[tuple[int, int], ...] | None  # (width, height) in px, prompts take turns; None: the checkpoint's, and two oblong
    seed: int = Field(ge=0, lt=2**63)  # of the first prompt's noise, the next integer for the next
    rows: int = Field(ge=1, le=65536)  # tokens of each prompt that are kept of a group's input, over all steps and both texts


class FormatRule(BaseModel):
    """Another format than the recipe's for the groups that a pattern names. The last rule that matches holds."""

    model_config = _STRICT

    groups: str  # as fnmatch: * and ? also match dots
    format: Format


class Recipe(BaseModel):
    """The keys of a recipe's file, which says what they mean."""

    model_config = _STRICT

    format: Format
    keep: tuple[str, ...]
    formats: tuple[FormatRule, ...]
    activations: Literal["static", "dynamic"]
    method: Method
    percentile: float = Field(gt=50, le=100)
    smoothquant: Exponent | None
    awq: tuple[Exponent, ...] | None = Field(min_length=1)
    low_rank: int = Field(ge=0, le=1024)
    calibration: CalibrationSettings
    text_encoder: EncoderChoice = None  # of the denoiser alone, as recipes of before: null
    text_encoder_table: TableChoice = None  # None: as text_encoder; but for host not read where that is None
    text_projection: WeightChoice = None
    text_encoder_smoothquant: Exponent | None = 0.5  # this and the next are read for w8a8 alone
    text_encoder_keep: tuple[str, ...] = ()  # groups of the text encoder whose weights alone are int8

    @model_validator(mode="after")
    def _one_smoothing(self) -> Self:
        if self.smoothquant is not None and self.awq is not None:
            raise ValueError("got both smoothquant and awq, which choose the same scales; expected one. Set one to null")
        return self

    def formats_of(self, groups: Sequence[str]) -> dict[str, Format]:
        """The format of every group. Raises ConfigError for a pattern that matches none, with the nearest group."""
        found: dict[str, Format] = dict.fromkeys(groups, self.format)
        for rule in self.formats:
            found.update(dict.fromkeys(_matched("formats", rule.groups, groups), rule.format))
        for pattern in self.keep:
            found.update(dict.fromkeys(_matched("keep", pattern, groups), "none"))
        return found

    def of_text(self, groups: Sequence[str]) -> dict[str, Format]:
        """As formats_of, of the text encoder's groups under w8a8."""
        kept = {group for pattern in self.text_encoder_keep for group in _matched("text_encoder_keep", pattern, groups)}
        return {group: "none" if group in kept else "int8" for group in groups}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Recipe:
    """The recipe of a name in configs/quantization, or of a .yaml file, with `overrides` (key=value). Raises ConfigError."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or isinstance(name_or_path, Path):
        path = Path(text)
        if path.suffix != ".yaml" or not path.is_file():
            raise ConfigError(f"{path}: no such recipe; expected a .yaml file, or a name: {', '.join(names_in_group(GROUP))}.")
        return validate(compose(path.stem, overrides, path.parent), Recipe)
    there = names_in_group(GROUP, config_dir)
    variant, slash, _ = text.rpartition("/")
    if slash and variant.isidentifier():
        there += [f"{variant}/{name}" for name in names_in_group(f"{GROUP}/{variant}", config_dir)]
    if text not in there:
        raise ConfigError(f"recipe: got {text!r}; {nearest(text, there)}. A file of your own ends in .yaml.")
    return validate(compose(f"{GROUP}/{text}", overrides, config_dir), Recipe)


def name_for(variant: str | None, name: str) -> str:
    """The recipe that a build of a published variant follows for the name of a format: its own where one ships."""
    return f"{variant}/{name}" if variant is not None and name in names_in_group(f"{GROUP}/{variant}") else name


def _matched(key: str, pattern: str, groups: Sequence[str]) -> list[str]:
    matched = [group for group in groups if fnmatch.fnmatchcase(group, pattern)]
    if not matched:
        raise ConfigError(f"{key}: got {pattern!r}, which matches no group of layers; {_nearest_group(pattern, groups)}.")
    return matched


def _nearest_group(pattern: str, groups: Sequence[str]) -> str:
    """Not all groups are listed: there may be hundreds."""
    import difflib

    near = difflib.get_close_matches(pattern, groups, n=1, cutoff=0.0)
    return f"the nearest is {near[0]!r}, of {len(groups)}" if near else "there are none"
