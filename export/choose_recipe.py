"""Choose the format of every group under a budget, and write it as a recipe that a person can read and change.

    python -m export.choose_recipe --model models/sana-tiny --recipe nvfp4 --formats nvfp4,fp8 --budget "size<=0.36" --out mine.yaml

A sensitivity pass measures each group alone, a knapsack picks, and what was picked is measured as a whole. Under budgets of
pictures (lpips, psnr_db) the errors of latents are the proxy: the smallest allocation whose pictures hold the budget is searched
for, each one tried being measured by a function that is given (`Measure`; export/budgeted.py has the one of a build).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from engines.arguments import ArgumentParser
from engines.errors import SanaError, SpecError
from engines.spec import nearest
from engines.store import Store
from export.allocation import Choice, pareto_front
from export.budget import Budget, parse_budget
from export.progress import Progress
from export.recipe import FormatRule, Recipe, load_recipe
from export.sensitivity import Table
from sana_ref import checkpoint as checkpoints
from sana_ref.quantization import FORMATS, Format, QuantizationPlan, groups_of
from sana_ref.quantize_ops import BLOCK
from sana_ref.text_projection import is_text_parameter

__all__ = ["Chosen", "Measure", "Sizes", "check_size", "choose", "group_bytes", "recipe_text", "sizes_of"]

Allocation = dict[str, Choice]
Measure = Callable[[Mapping[str, Format]], Mapping[str, float]]  # formats of groups -> metrics of Budget: lpips, psnr_db, error
PROBES = 33  # of the front, between which a budget of pictures is searched: 8 measurements at most
NUM_NAMED = 5  # groups that stand in the way


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a denoiser. fixed: all that is no group, in 16 bits. half: everything in 16 bits."""

    fixed: int
    half: int

    def ratio(self, allocation: Mapping[str, Choice]) -> float:
        return (self.fixed + sum(choice.num_bytes for choice in allocation.values())) / self.half

    def room(self, ratio: float) -> float:
        """Bytes of groups that a size of `ratio` leaves."""
        return ratio * self.half - self.fixed


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """measured: size, and what was measured of the whole."""

    allocation: Allocation
    measured: dict[str, float]


def group_bytes(kind: Format, columns: int, depth: int, *, rank: int = 0, smooth: bool = False) -> int:
    """Of a weight (columns, depth) and what goes with it: scales, smoothing and (nvfp4 alone) the low-rank branch in 16 bits."""
    numbers = columns * depth
    extra = 2 * depth if smooth and kind != "none" else 0
    if kind == "none":
        return 2 * numbers
    if kind == "nvfp4":
        return numbers // 2 + numbers // BLOCK + 4 + 2 * rank * (columns + depth) + extra
    return numbers + 4 * columns + extra


def sizes_of(transformer: nn.Module) -> tuple[Sizes, dict[str, tuple[int, int]]]:
    """Of the denoiser, without the text's projection, which is a component of its own; and each group's (columns, depth)."""
    own = {name: p for name, p in transformer.named_parameters() if not is_text_parameter(name)}
    shapes = {group: (sum(own[name].shape[0] for name in names), own[names[0]].shape[1]) for group, names in groups_of(own).items()}
    half = 2 * sum(parameter.numel() for parameter in own.values())
    return Sizes(fixed=half - 2 * sum(columns * depth for columns, depth in shapes.values()), half=half), shapes


def check_size(choices: Mapping[str, Sequence[Choice]], sizes: Sizes, budget: Budget) -> None:
    """Raises SpecError if even the smallest formats are too large for the budget. Errors of choices are not read."""
    smallest = {group: min(offered, key=lambda choice: choice.num_bytes) for group, offered in choices.items()}
    if budget.size is not None and sum(choice.num_bytes for choice in smallest.values()) > sizes.room(budget.size):
        raise SpecError(
            f"budget: got {budget}; the smallest that the formats allow is size {sizes.ratio(smallest):.4g}. "
            f"Allow more, or offer a smaller format. The largest groups: {_names(smallest, lambda choice: choice.num_bytes)}."
        )


def choose(choices: Mapping[str, Sequence[Choice]], sizes: Sizes, budget: Budget, measure: Measure) -> Chosen:
    """The allocation for `budget`; `measure` is called with what is chosen, and its word holds.

    With `size` alone: the least error that fits. Otherwise the smallest for which everything asked holds.
    Raises SpecError if the budget cannot be met, naming the groups that stand in the way.
    """
    check_size(choices, sizes, budget)
    front = pareto_front(choices)
    best = front.least_error(float(front.num_bytes[-1]) if budget.size is None else sizes.room(budget.size))
    assert best is not None  # check_size

    def of(state: int) -> Chosen:
        allocation = front.allocation(state)
        seen = dict(measure({group: choice.format for group, choice in allocation.items()}))
        return Chosen(allocation=allocation, measured={**seen, "size": sizes.ratio(allocation)})

    chosen = of(best)
    if missed := budget.missed(chosen.measured):
        raise SpecError(
            f"budget: cannot be met: {'; '.join(missed)}. In the way, by their part of the error: "
            f"{_names(chosen.allocation, lambda choice: choice.error)}. Offer a more precise format for them, or allow more."
        )
    if budget.error is None and not budget.of_pictures:
        return chosen
    low, high = 0, best  # what is known to hold is at `high`; pictures are taken to get better with bytes
    while high - low > max(0, best // PROBES):
        middle = (low + high) // 2
        tried = of(middle)
        if budget.missed(tried.measured):
            low = middle + 1
        else:
            chosen, high = tried, middle
    if low < high and not budget.missed((tried := of(low)).measured):  # the smallest that is left
        chosen = tried
    return chosen


def _names(allocation: Allocation, by: Callable[[Choice], float]) -> str:
    worst = sorted(allocation, key=lambda group: -by(allocation[group]))[:NUM_NAMED]
    return ", ".join(f"{group} ({allocation[group].format})" for group in worst)


def recipe_text(recipe: Recipe, chosen: Chosen, sizes: Sizes, budget: Budget, model: str) -> str:
    """YAML that load_recipe reads, with a line for each decision."""
    values = recipe.model_dump(mode="json", exclude={"formats", "keep"})
    measured = ", ".join(f"{name} {value:.4g}" for name, value in sorted(chosen.measured.items()))
    lines = [f"# {model} under the budget {budget}. Measured: {measured}.", "# Each line: the error of the final latents with this"]
    lines[1] += " group alone in its format, and its bytes, of those in 16 bits."
    lines += [yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True).rstrip() for name, value in values.items()]
    lines += ["keep: []", "formats:"]
    for group, choice in chosen.allocation.items():
        lines.append(f"  - {{groups: {group}, format: {choice.format}}}  # error {choice.error:.2e}, {choice.num_bytes} bytes")
    return "\n".join(lines) + "\n"


def with_formats(recipe: Recipe, formats: Mapping[str, Format]) -> Recipe:
    rules = tuple(FormatRule(groups=group, format=kind) for group, kind in formats.items())
    return recipe.model_copy(update={"keep": (), "formats": rules})


def offers(table: Table, shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> dict[str, list[Choice]]:
    """What each group may be: as precise as the rest, or a format that was measured."""
    smooth = recipe.smoothquant is not None or recipe.awq is not None
    found = {}
    for group, shape in shapes.items():
        errors: dict[Format, float] = {"none": 0.0, **table.get(group, {})}
        found[group] = [
            Choice(format=kind, num_bytes=group_bytes(kind, *shape, rank=recipe.low_rank, smooth=smooth), error=error)
            for kind, error in errors.items()
        ]
    return found


def combined(plans: Mapping[Format, QuantizationPlan], formats: Mapping[str, Format]) -> QuantizationPlan:
    """Of each group the plan of its format: what make_plan makes of the recipe that says so."""
    layers = {group: plans[kind].layers[group] for group, kind in formats.items() if kind != "none"}
    tensors = {
        name: tensor
        for kind, plan in plans.items()
        for name, tensor in plan.tensors.items()
        if formats.get(name.rpartition(".")[0]) == kind
    }
    return QuantizationPlan(layers=layers, tensors=tensors)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m export.choose_recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="a key of the recipe")
    add("--model", required=True)
    add("--recipe", required=True, help="what all but the formats comes from")
    add("--formats", default="nvfp4,fp8", help="what a group may be, besides none")
    add("--budget", required=True, help='"size<=0.36", "lpips<=0.08, psnr_db>=19", "error<=0.02"')
    add("--num-runs", type=int, default=2, help="of those that calibrate, on which each group is measured alone")
    add("--out", type=Path, required=True, metavar="YAML")
    add("--cache", type=Path)
    add("--device", default="cpu")
    return parser


def _run(options: argparse.Namespace) -> None:
    budget = parse_budget(options.budget)
    words = options.formats.split(",")
    for word in words:
        if word not in FORMATS[1:]:
            raise SpecError(f"formats: got {word!r}; {nearest(word, FORMATS[1:])}.")
    recipe = load_recipe(options.recipe, options.overrides)
    checkpoint = checkpoints.load(options.model)
    store, progress = Store(options.cache), Progress()
    from export.budgeted import choose_for  # which is made of what is here

    chosen = choose_for(
        checkpoint, recipe, words, budget, store=store, progress=progress, device=options.device, num_runs=options.num_runs
    )
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}.new")
    temporary.write_text(chosen.text(recipe), encoding="utf-8")
    os.replace(temporary, options.out)
    progress.say(f"{options.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(chosen.measured.items())))


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 or 2 with a message if it cannot be; 130 after Ctrl-C."""
    try:
        _run(_parser().parse_intermixed_args(argv))
    except SanaError as error:
        print(f"choose_recipe: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError) else 1
    except KeyboardInterrupt:
        print("choose_recipe: interrupted. Finished runs are kept, and read when it is started again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
