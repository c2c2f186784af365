"""Recipes of the published variants, by structure: their weights are not read, and nothing here was measured on them.

    python -m export.variant_recipes measure --model models/sana-tiny --steps 4 --num-runs 1    # writes TABLE
    python -m export.variant_recipes write                                # configs/quantization/VARIANT/FORMAT.yaml

What a group of layers costs is taken from a small trained model of the same architecture (export/sensitivity.py): of the group of
the same kind at the same share of the depth, divided between the blocks of the larger one. Bytes are the variant's. Then the
knapsack (export/allocation.py) says which groups are worth more bits, within ALLOWANCE of the plain recipe's size: fp16 beside int8
and fp8, fp8 beside nvfp4. A budget (--budget) measures instead, on the weights that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from engines.errors import SanaError
from engines.store import Store
from export.allocation import Choice, pareto_front
from export.calibration_data import draw_all, plan_runs
from export.choose_recipe import Sizes, group_bytes, sizes_of
from export.fingerprint import versions
from export.progress import Progress
from export.quantization_plan import make_plan
from export.recipe import Recipe, load_recipe
from export.sensitivity import Table, measure
from runtime.config import CONFIGS
from sana_ref.build import empty
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import Format
from sana_ref.transformer import SanaTransformer2DModel
from sana_ref.variants import VARIANTS

__all__ = ["ALLOWANCE", "BETTER", "TABLE", "chosen", "expected_errors", "main", "read_table", "text_of"]

ALLOWANCE = 0.01  # of the denoiser's bytes in fp16: a third of what the goals leave, because the pipeline's memory has less room
BETTER: dict[Format, Format] = {"int8": "none", "fp8": "none", "nvfp4": "fp8"}  # what the groups that need it get
TABLE = Path("benchmarks/results/sensitivity_sana_tiny.json")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def _place(group: str) -> tuple[int, str]:
    """The block, and the kind of the group, such as attn1.to_qkv."""
    match = _BLOCK.fullmatch(group)
    assert match is not None  # groups are of blocks alone (sana_ref/quantization.py)
    return int(match[1]), match[2]


def expected_errors(table: Table, groups: list[str]) -> Table:
    """Of the groups of a model with any number of blocks, from `table` of one with fewer.

    A block gets the error that lies at its depth, linear between the middles of measured blocks. Each is divided by how many blocks
    stand for a measured one: small errors of independent groups add up, as the knapsack takes them to.
    """
    measured: dict[str, dict[int, dict[Format, float]]] = defaultdict(dict)
    for group, errors in table.items():
        block, kind = _place(group)
        measured[kind][block] = errors
    there = 1 + max(_place(group)[0] for group in table)
    blocks = 1 + max(_place(group)[0] for group in groups)
    found: Table = {}
    for group in groups:
        block, kind = _place(group)
        at = min(max((block + 0.5) / blocks * there - 0.5, 0.0), there - 1.0)
        low = min(int(at), there - 2) if there > 1 else 0
        high, part = min(low + 1, there - 1), at - low
        first, second = measured[kind][low], measured[kind][high]
        found[group] = {form: ((1 - part) * first[form] + part * second[form]) * there / blocks for form in first}
    return found


def chosen(transformer: SanaTransformer2DModel, recipe: Recipe, table: Table) -> tuple[dict[str, Choice], Sizes]:
    """The choice for each group. transformer: shapes suffice."""
    sizes, shapes = sizes_of(transformer)
    errors = expected_errors(table, list(shapes))
    kinds = (recipe.format, BETTER[recipe.format])
    smooth = recipe.smoothquant is not None or recipe.awq is not None
    choices = {
        group: [
            Choice(
                format=kind,
                num_bytes=group_bytes(kind, *shape, rank=recipe.low_rank, smooth=smooth),
                error=0.0 if kind == "none" else errors[group][kind],
            )
            for kind in kinds
        ]
        for group, shape in shapes.items()
    }
    plain = sum(options[0].num_bytes for options in choices.values())
    front = pareto_front(choices)
    best = front.least_error(plain + ALLOWANCE * sizes.half)
    assert best is not None  # the plain recipe fits
    return dict(front.allocation(best)), sizes


def text_of(variant: str, name: str, table: Table) -> str:
    """The YAML file of a variant and a recipe that ships."""
    recipe = load_recipe(name)
    transformer = empty(lambda: SanaTransformer2DModel(VARIANTS[variant].transformer))
    allocation, sizes = chosen(transformer, recipe, table)
    errors = expected_errors(table, list(allocation))
    better = [group for group, choice in allocation.items() if choice.format != recipe.format]
    plain = sum(errors[group][recipe.format] for group in allocation)
    left = sum(choice.error for choice in allocation.values())
    lines = [
        "# @package _global_",
        f"# {name} for {variant}, by structure: from its shapes and the sensitivities of sana-tiny (export/variant_recipes.py).",
        "# Not measured on the published weights: --budget does that.",
        f"# {len(better)} of {len(allocation)} groups of layers in {_words(BETTER[recipe.format])}: size "
        f"{sizes.ratio(allocation):.4f} of fp16's; expected error {left / plain:.2f} of that of {name} alone.",
        "defaults:",
        f"  - /quantization/{name}@_global_",
        "  - _self_",
    ]
    if BETTER[recipe.format] == "none":
        lines += ["keep:", *(f"  - {group}" for group in better)]
    else:
        lines += ["formats:", *(f"  - {{groups: {group}, format: {allocation[group].format}}}" for group in better)]
    return "\n".join(lines) + "\n"


def _words(kind: Format) -> str:
    return "fp16" if kind == "none" else kind


def read_table(path: Path) -> Table:
    table: Table = json.loads(path.read_text(encoding="utf-8"))["errors"]
    return table


def _measure(options: argparse.Namespace) -> None:
    checkpoint, store, progress = load(options.model), Store(options.cache), Progress()
    plans = {kind: make_plan(checkpoint, load_recipe(kind), store=store, progress=progress) for kind in BETTER}
    side = checkpoint.transformer_config.sample_size * checkpoint.vae_config.px_per_latent
    settings = load_recipe("int8").calibration.model_copy(
        update={"steps": options.steps, "num_prompts": options.num_runs, "sizes": ((side, side),)}
    )
    reference = SanaReference(checkpoint)
    runs = draw_all(reference, plan_runs(checkpoint, settings), store, progress)
    record: dict[str, Any] = {
        "what": "relative squared error of the final latents with one group of layers quantized, mean over runs",
        "checkpoint": checkpoint.digest,
        "command": f"python -m export.variant_recipes measure --steps {options.steps} --num-runs {options.num_runs}",
        "versions": versions(),
        "errors": measure(reference, plans, runs, store=store, progress=progress),
    }
    _write(options.table, json.dumps(record, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """0; 1 with a message if it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m export.variant_recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "write"))
    parser.add_argument("--model", default="models/sana-tiny")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--num-runs", type=int, default=2)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE, metavar="JSON", help="what `measure` writes and `write` reads")
    parser.add_argument("--out", type=Path, default=CONFIGS / "quantization", help="folder of the recipes")
    options = parser.parse_args(arguments)
    try:
        if options.what == "measure":
            _measure(options)
            return 0
        table = read_table(options.table)
        for variant in VARIANTS:
            for name in BETTER:
                _write(options.out / variant / f"{name}.yaml", text_of(variant, name, table))
    except (SanaError, OSError) as error:
        print(f"variant_recipes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
