"""Which weights of the text's components a build stores in 4 or 8 bits, and what that costs.

    weights = text_weights(recipe)   # {"text_encoder": "int8", "text_encoder_table": "host", "text_projection": "int8"}
    check_weights(weights, targets)

On sm90 they stay as they are: cuBLASLt multiplies there (export/linear_nodes.py), and takes 16-bit weights. A table on the host is
one on every GPU: nothing multiplies with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import SpecError
from engines.golden import Golden
from engines.spec import Target
from engines.weight_report import OutputError, RoleReport
from export.progress import Progress
from export.recipe import Recipe
from sana_ref.components import select_tokens
from sana_ref.weight_only import HOST, TextFormat, TextPart, role_of

__all__ = ["Weights", "WeightsSeen", "check_weights", "for_targets", "output_errors", "text_weights"]

Weights = Mapping[TextPart, TextFormat]
Outputs = Mapping[str, NDArray[np.generic]]
WITHOUT_FP8 = (Target.SM80, Target.SM86)


def text_weights(recipe: Recipe) -> dict[TextPart, TextFormat]:
    """Without what is left as it is, and without a table of its text encoder's format."""
    encoder = "int8" if recipe.text_encoder == "w8a8" else recipe.text_encoder
    asked: dict[TextPart, TextFormat | None] = {
        "text_encoder": recipe.text_encoder,
        "text_encoder_table": None if recipe.text_encoder_table == encoder else recipe.text_encoder_table,
        "text_projection": recipe.text_projection,
    }
    if recipe.text_encoder is None and recipe.text_encoder_table != HOST:
        del asked["text_encoder_table"]
    return {name: kind for name, kind in asked.items() if kind is not None}


def check_weights(weights: Weights, targets: tuple[Target, ...]) -> None:
    """Raises SpecError for a format that one of the architectures has no product for. INT4, INT8 and W8A8 run on all of them."""
    without = [target for target in targets if target in WITHOUT_FP8]
    for name, kind in weights.items():
        if kind == "fp8" and without:
            raise SpecError(
                f"{name}: got fp8 for {', '.join(without)}; expected sm89 or later: FP8 needs its hardware. "
                f"Set {name} to int8 there (--recipe-key {name}=int8)."
            )


def for_targets(weights: Weights, targets: tuple[Target, ...], progress: Progress) -> Weights:
    """`weights`; where sm90 is a target, of them only a table on the host, which is said."""
    wide = {name: kind for name, kind in weights.items() if kind == HOST}
    if len(wide) == len(weights) or Target.SM90 not in targets:
        return weights
    named = " and ".join(f"{name.replace('_', ' ')} ({kind})" for name, kind in weights.items() if name not in wide)
    progress.say(f"  {named}: weights stay 16-bit for sm90, where cuBLASLt multiplies and takes no others")
    return wide


class Stored(Protocol):
    """What is stored in place of a weight (columns, depth)."""

    def real(self) -> Tensor: ...
    def num_bytes(self) -> int: ...


@dataclass(kw_only=True)
class WeightsSeen:
    """Sums over what was quantized, by role."""

    counts: dict[str, list[int]] = field(default_factory=dict)  # tensors, bytes before, bytes after
    squares: dict[str, list[float]] = field(default_factory=dict)  # of what was lost, of the weights

    def add(self, name: str, weight: Tensor, packed: Stored) -> None:
        role, rows = role_of(name), max(1, (1 << 20) // weight.shape[1])
        counts, squares = self.counts.setdefault(role, [0, 0, 0]), self.squares.setdefault(role, [0.0, 0.0])
        for index, amount in enumerate((1, 2 * weight.numel(), packed.num_bytes())):
            counts[index] += amount
        real = packed.real()
        for begin in range(0, len(weight), rows):  # fp32 copies of a table of 256,000 rows would take gigabytes
            exact = weight[begin : begin + rows].float()
            squares[0] += float((real[begin : begin + rows].float() - exact).square().sum())
            squares[1] += float(exact.square().sum())

    def roles(self) -> dict[str, RoleReport]:
        return {
            role: RoleReport(tensors=tensors, bytes_before=before, bytes_after=after, error=(lost / max(own, 1e-300)) ** 0.5)
            for role, (tensors, before, after) in self.counts.items()
            for lost, own in [self.squares[role]]
        }


def output_errors(exact: Mapping[str, Outputs], quantized: Mapping[str, Golden]) -> dict[str, OutputError]:
    """exact: case: output: array, of weights that are not quantized; quantized: the same cases. States of padding are left out."""
    found = {}
    for name in next(iter(exact.values())):
        cases = [(outputs[name], quantized[case]) for case, outputs in exact.items()]
        wide = [(_vectors(want, case), _vectors(case.outputs[name], case)) for want, case in cases]
        lost = sum(float(np.square(got - want).sum()) for want, got in wide)
        own = sum(float(np.square(want).sum()) for want, _ in wide)
        cosines = np.concatenate([_cosines(want, got) for want, got in wide])
        rms = (lost / max(own, 1e-300)) ** 0.5
        found[name] = OutputError(rms=rms, cosine=float(cosines.mean()), least_cosine=float(cosines.min()))
    return found


def _vectors(output: NDArray[np.generic], case: Golden) -> NDArray[np.float64]:
    """(n, C) of an output (…, C); of the text encoder's, the tokens that its mask has."""
    wide = output.astype(np.float64)
    mask = case.inputs.get("attention_mask")
    if mask is None:
        return wide.reshape(-1, wide.shape[-1])
    return wide[select_tokens(torch.from_numpy(mask), wide.shape[1]).numpy() > 0]


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: NDArray[np.float64] = (a * b).sum(-1) / np.maximum(sizes, 1e-300)
    return cosines.ravel()
