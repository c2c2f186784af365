"""Calibrate a checkpoint: a recipe in, a plan of its quantization and a report of what was seen out.

    python -m export.calibrate --model models/sana-tiny --recipe nvfp4 --out out/calibration
    python export/build_engine.py --model models/sana-tiny --precision nvfp4 --plan out/calibration/plan.safetensors …

A calibration that was killed goes on where it was. The folder: plan.safetensors, calibration.json and calibration.html; with
text_encoder=w8a8 the plan is of both, and text_encoder/ has the same two pages of the text encoder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.arguments import ArgumentParser
from engines.atomic import make_temporary, remove_dead, replace_folder
from engines.errors import SanaError, SpecError
from export.progress import Progress
from export.recipe import load_recipe

__all__ = ["main"]

_PREFIX = ".new-calibration-"


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m export.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="a key of the recipe: calibration.num_prompts=8")
    add("--model", required=True, help="a folder in diffusers' layout, or owner/name on the Hugging Face Hub")
    add("--revision", help="commit, tag or branch on the Hub")
    add("--recipe", required=True, help="a name in configs/quantization, or a .yaml file")
    add("--out", type=Path, required=True, metavar="FOLDER", help="replaced when all is done")
    add("--cache", type=Path, help="where finished runs are kept")
    add("--device", default="cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 for what cannot be asked, 1 for what failed, 130 after Ctrl-C; the message goes to stderr."""
    options = _parser().parse_intermixed_args(argv)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        from engines.store import Store
        from export.quantization_plan import calibrate
        from export.text_calibration import calibrate_text
        from sana_ref import checkpoint as checkpoints

        progress, store = Progress(), Store(options.cache)
        checkpoint = checkpoints.load(options.model, revision=options.revision)
        made = calibrate(checkpoint, recipe, store=store, progress=progress, device=options.device)
        text = None
        if recipe.text_encoder == "w8a8":
            text = calibrate_text(checkpoint, recipe, store=store, progress=progress, device=options.device)
        _publish(made, text, options.out)
        progress.say(f"{options.out}: done, {progress.seconds:.0f} s.")
    except SanaError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError) else 1
    except KeyboardInterrupt:
        print("calibrate: interrupted. Finished runs are kept, and read when it is started again.", file=sys.stderr)
        return 130
    return 0


def _publish(made: Path, text: Path | None, out: Path) -> None:
    """text: the text encoder's, if it has one. Raises SpecError if something that is no calibration is at `out`."""
    if out.exists() and not (out / "calibration.json").is_file():
        raise SpecError(f"{out}: got a folder or file that is no calibration; expected none, or one. Name another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(out.parent, _PREFIX)
    temporary = make_temporary(out.parent, _PREFIX)
    try:
        shutil.copytree(made, temporary.path, dirs_exist_ok=True)
        if text is not None:
            _add_text(text, temporary.path)
        replace_folder(temporary.path, out)
    finally:
        temporary.remove()


def _add_text(made: Path, out: Path) -> None:
    from export.quantization_plan import PLAN
    from sana_ref.quantization import load_plan, save_plan

    shutil.copytree(made, out / "text_encoder", ignore=shutil.ignore_patterns(PLAN))
    plan, text = load_plan(out / PLAN), load_plan(made / PLAN)
    both = {"layers": {**plan.layers, **text.layers}, "tensors": {**plan.tensors, **text.tensors}}
    whole = out / f".{PLAN}"  # tensors of `plan` may be mapped from the file that this one takes the place of
    save_plan(plan.model_copy(update={**both, "notes": {**text.notes, **plan.notes}}), whole)
    whole.replace(out / PLAN)


if __name__ == "__main__":
    sys.exit(main())
