"""Recipes that calibrate the tiny checkpoint in a second, and a build by them from the command line."""

import functools
from pathlib import Path

from tiny_build import cache, shared, tiny

from export.build_engine import main
from export.recipe import Recipe, load_recipe

__all__ = ["SHORT", "command", "prompts", "recipe"]

SHORT = ("calibration.num_prompts=2", "calibration.steps=2", "calibration.sizes=[[64,64]]", "calibration.rows=10", "low_rank=0")


@functools.cache
def prompts() -> Path:
    path = shared() / "prompts.txt"
    path.write_text("a cat\na dog\n", encoding="utf-8")
    return path


def recipe(name: str = "int8", *keys: str) -> Recipe:
    made = load_recipe(name, [*SHORT, *keys])
    return made.model_copy(update={"calibration": made.calibration.model_copy(update={"prompts": prompts()})})


def command(out: Path, *words: str) -> int:
    """The exit code of a build of the denoiser's portable graph, unless `words` say otherwise."""
    fixed = ["--model", str(tiny()), "--out", str(out), "--cache", str(cache()), "--target", "onnx", "--components", "denoiser"]
    return main([*fixed, *words])
