"""What a quantized denoiser weighs, of the same in fp16: reckoned from shapes, for models whose weights need not be there.

    python benchmarks/quantized_sizes.py --variant sana_1600m_1024px --recipes int8,fp8,nvfp4 --record
    python benchmarks/quantized_sizes.py --model models/sana-tiny

The denoiser is what runs at every step; the text's projection is a component of its own. Each group counts with its numbers,
scales, smoothing and low-rank branch (export/choose_recipe.py), and all that is no group in 16 bits. The largest parts of that
rest are named.
--record appends quant_FORMAT_size_ratio of sana_1600m_1024px; of others quant_FORMAT_MODEL_size_ratio: quant_fp8_tiny_size_ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.figures import record
from engines.errors import SanaError
from export.choose_recipe import group_bytes, sizes_of
from export.recipe import Recipe, load_recipe, name_for
from sana_ref.build import empty
from sana_ref.checkpoint import load
from sana_ref.quantization import group_of
from sana_ref.text_projection import is_text_parameter
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from sana_ref.variants import VARIANTS

__all__ = ["Weight", "main", "rest", "weigh"]

TARGETED = "sana_1600m_1024px"  # of which the figure has no name of its own


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Bytes. half: all in 16 bits. numbers: of groups, with scales. branches: of 4-bit weights. fixed: of no group."""

    half: int
    numbers: int
    branches: int
    fixed: int

    @property
    def ratio(self) -> float:
        return (self.numbers + self.branches + self.fixed) / self.half


def weigh(transformer: nn.Module, recipe: Recipe) -> Weight:
    """transformer: shapes suffice. Smoothing counts wherever the recipe may make it. Raises ConfigError for a recipe of others."""
    sizes, sides = sizes_of(transformer)
    smooth = recipe.smoothquant is not None or recipe.awq is not None
    numbers = whole = 0
    for group, kind in recipe.formats_of(list(sides)).items():
        numbers += group_bytes(kind, *sides[group], smooth=smooth)
        whole += group_bytes(kind, *sides[group], rank=recipe.low_rank, smooth=smooth)
    return Weight(half=sizes.half, numbers=numbers, branches=whole - numbers, fixed=sizes.fixed)


def rest(transformer: nn.Module) -> Mapping[str, int]:
    """Bytes in 16 bits of what is no group, by part, the blocks' together; the largest first."""
    found: Counter[str] = Counter()
    for name, parameter in transformer.named_parameters():
        if group_of(name) is None and not is_text_parameter(name):
            words = [word for word in name.split(".") if not word.isdigit()]
            found[".".join(words[1:] if words[0] == "transformer_blocks" else words[:1])] += 2 * parameter.numel()
    return dict(found.most_common())


def _shapes(config: SanaTransformerConfig) -> nn.Module:
    return empty(lambda: SanaTransformer2DModel(config))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--variant", choices=sorted(VARIANTS), help="a published model, by its shapes")
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--recipes", default="int8,fp8,nvfp4", help="names in configs/quantization, or .yaml files")
    parser.add_argument("--key", action="append", default=[], metavar="KEY=VALUE", help="over each recipe: low_rank=0")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for a recipe or a checkpoint that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        config = VARIANTS[options.variant].transformer if options.variant else load(options.model).transformer_config
        names = [name_for(options.variant, name) for name in options.recipes.split(",")]
        recipes = {name: load_recipe(name, options.key) for name in names}
        transformer = _shapes(config)
        found = {name: weigh(transformer, recipe) for name, recipe in recipes.items()}
    except SanaError as error:
        print(f"quantized_sizes: {error}", file=sys.stderr)
        return 1
    model = options.variant or options.model.name
    for name, weight in found.items():
        shares = {part: getattr(weight, part) / weight.half for part in ("numbers", "branches", "fixed")}
        text = ", ".join(f"{part} {share:.4f}" for part, share in shares.items())
        print(f"{model} {name}: {weight.ratio:.4f} of fp16's {weight.half} bytes ({text})")
        if options.record:
            which = "" if model == TARGETED else f"_{model[5:] if model.startswith(('sana_', 'sana-')) else model}"
            figure = f"quant_{recipes[name].format}{which}_size_ratio"
            keys = "".join(f" {key}" for key in options.key)
            note = f"{model}, denoiser's weights reckoned from shapes, recipe {name}{keys}: {text}"
            print(json.dumps(record(figure, weight.ratio, "ratio", note=note)))
    parts = ", ".join(f"{part} {size / next(iter(found.values())).half:.4f}" for part, size in list(rest(transformer).items())[:6])
    print(f"{model}, in 16 bits always: {parts}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
