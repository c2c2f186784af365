"""The schema of configs/build.yaml: what a build may be told, with the command line's flags laid over the files.

    settings = load("build", ["precision=bf16"], flags={"checkpoint": "models/sana-tiny", "out": "out/sana-tiny"})
    python -m export.settings build precision=bf16     # check, and say what is wrong

Nothing here imports PyTorch, so that a mistake is found before anything is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from engines.errors import ConfigError
from engines.spec import Precision, nearest
from runtime.config import compose, names_in_group, validate
from runtime.config_origins import Origin

__all__ = ["RECIPES", "BuildSettings", "load"]

RECIPES = "quantization"  # the folder of configs/


def _split(value: Any) -> Any:
    """`sm89,sm120`, as the flags write it, is a list too."""
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    return tuple(words) if isinstance(words, list) else words


def _precision(word: str) -> str:
    """A precision, a recipe's name, or the file of one, which is read where it is used."""
    names = [*Precision, *(name for name in names_in_group(RECIPES) if name not in set(Precision))]
    if word not in names and not word.endswith(".yaml"):
        raise ValueError(f"got {word!r}; {nearest(word, names)}; or a recipe, whose file ends in .yaml")
    return word


def _listed(value: Any) -> Any:
    """Values of a recipe's keys have commas of their own."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_split)]


class BuildSettings(BaseModel):
    """The keys of configs/build.yaml, which has their defaults and says what they mean.

    Words for targets and components, and the order of the sides, are checked where they are used: some depend on the checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str | None  # not `model`, which would be a group of files
    revision: str | None
    variant: Literal["fp16", "bf16"] | None
    components_from: str | None
    vae: Path | None
    precision: Annotated[str, AfterValidator(_precision)]
    decoder_precision: Literal["fp32", "bf16", "fp8", "int8"] | None
    plan: Path | None
    calibrate: bool
    calibration_prompts: Path | None
    recipe_keys: Annotated[tuple[str, ...], BeforeValidator(_listed)]
    recipe_out: Path | None
    budget: str | None
    budget_formats: Words | None
    device: Literal["auto", "cpu", "cuda"]
    target: Words
    components: Words
    min_side: int | None
    default_side: int | None
    max_side: int | None
    max_batch: int
    out: Path | None
    cache: Path | None
    report: Path | None


def load(
    config: str = "build",
    overrides: Sequence[str] = (),
    config_dir: Path | str | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
) -> BuildSettings:
    """configs/CONFIG.yaml, `overrides` (key=value) over it, and `flags` (field: value) over both. Raises ConfigError."""
    composed = compose(config, overrides, config_dir)
    for name, value in (flags or {}).items():
        composed.values[name] = str(value) if isinstance(value, Path) else value
        composed.origins.set((name,), Origin(None))
    return validate(composed, BuildSettings)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the configuration fits the schema; 2 with the message if not."""
    parser = argparse.ArgumentParser(prog="python -m export.settings", description="Check a configuration of a build.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-dir", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        load(arguments.config, arguments.overrides, arguments.config_dir)
    except ConfigError as error:
        print(f"sana: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.config}: fits the schema of a build", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
