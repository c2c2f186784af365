"""A quantised transformer in PyTorch: what quantised graphs and engines are held against, and what a calibration measures.

The denoiser's, or the text encoder's, which is one too.

    with QuantizedLinears(transformer, plan):
        transformer(...)

Only the products of the planned groups change. Linear attention's state and normaliser, norms and softmax are as they were: sums
over all tokens would gather the error. The equation of a layer: sana_ref/quantization.py; the numbers: sana_ref/quantize_ops.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engines.errors import CheckpointError, SpecError
from sana_ref.quantization import Format, LayerPlan, QuantizationPlan, groups_of
from sana_ref.quantize_ops import (
    BLOCK,
    NVFP4_RANGE,
    QuantizedWeight,
    finite_range,
    quantize_weight,
    round_dynamic,
    round_nvfp4,
    round_static,
)

__all__ = [
    "MARGIN",
    "InputRanges",
    "Largest",
    "Products",
    "QuantizedLayer",
    "QuantizedLinears",
    "check_plan",
    "quantize_layer",
    "static_scale",
    "uniform_plan",
]

# FP8 is a floating format: with a scale that is this many times too large, numbers keep their digits down to 1/3600 of the largest
# that was seen, and what is smaller errs by less than 1/57000 of it. What is larger still is cut off.
MARGIN = 8.0


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What a group's product is made of. inverse_smooth (depth,) fp32; down (rank, depth), up (columns, rank) as the weight."""

    plan: LayerPlan
    weight: QuantizedWeight
    inverse_smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def real(self) -> Tensor:
        """(columns, depth) fp32: the weight without its smoothing and low-rank branch."""
        real = self.weight.real()
        return real if self.inverse_smooth is None else real * self.inverse_smooth

    def num_bytes(self) -> int:
        """Of what stands for the weight."""
        parts = (self.weight.numbers, self.weight.scale, self.weight.block_scale, self.inverse_smooth, self.down, self.up)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def rounded(self, x: Tensor) -> Tensor:
        """x (…, depth) fp32, quantised and dequantised."""
        kind, scale = self.plan.format, self.plan.input_scale
        if kind == "nvfp4":
            assert scale is not None  # check_plan
            return round_nvfp4(x, scale)
        assert kind != "none"
        return round_dynamic(x, kind) if scale is None else round_static(x, kind, scale)

    def product(self, x: Tensor, rows: slice, bias: Tensor | None) -> Tensor:
        """x (…, depth) -> (…, columns), of x's type. rows: of the weight, if not all of them."""
        wide = x.float() if self.inverse_smooth is None else x.float() * self.inverse_smooth
        out = F.linear(self.rounded(wide), self.weight.real()[rows])
        if self.down is not None and self.up is not None:
            narrow = wide.to(x.dtype)
            out = out + F.linear(F.linear(narrow, self.down.to(x.dtype)), self.up[rows].to(x.dtype)).float()
        return (out if bias is None else out + bias.float()).to(x.dtype)


def quantize_layer(plan: QuantizationPlan, group: str, weight: Tensor) -> QuantizedLayer:
    """weight (columns, depth): of all of the group's layers, in their own type, one below the other.

    Raises CheckpointError for a weight without a range, SpecError for a plan whose tensors or format do not fit the weight.
    """
    columns, depth = weight.shape
    layer = plan.layers[group]
    kind = layer.format
    assert kind != "none"
    smooth, down, up, scale = (plan.tensor(group, suffix) for suffix in ("smooth", "low_rank_down", "low_rank_up", "weight_scale"))
    rank = 0 if down is None else down.shape[0]
    _check_shapes(group, {"smooth": (depth,), "low_rank_down": (rank, depth), "low_rank_up": (columns, rank)}, plan)
    if (down is None) != (up is None):
        raise SpecError(f"plan, {group}: got one of low_rank_down and low_rank_up; expected both, or none. Calibrate again.")
    if kind == "nvfp4" and depth % BLOCK:
        raise SpecError(
            f"plan, {group}: got nvfp4 for a depth of {depth}; expected a multiple of {BLOCK}, which share a scale. Use fp8."
        )
    if scale is not None:
        _check_shapes(group, {"weight_scale": (columns,)}, plan)
        if kind == "nvfp4":
            raise SpecError(f"plan, {group}: got a weight_scale for nvfp4; expected one for int8 and fp8 alone. Leave it out.")
    for suffix, positive in (("smooth", smooth), ("weight_scale", scale)):
        if positive is not None and not bool((positive.isfinite() & (positive > 0)).all()):
            raise SpecError(f"plan, {group}.{suffix}: got zeros, negative numbers, infinity or NaN; expected numbers above 0.")
    name = f"{group}.weight"
    wide = weight.float()
    finite_range(wide, name)
    inverse = None if smooth is None else 1.0 / smooth.to(wide)
    if smooth is not None:
        wide = wide * smooth.to(wide)
    if down is not None and up is not None:
        down, up = (each.to(weight) for each in (down, up))  # as they are stored, so that the rest corrects their rounding
        finite_range(down, f"{group}.low_rank_down")
        finite_range(up, f"{group}.low_rank_up")
        wide = wide - up.float() @ down.float()
    quantized = quantize_weight(wide, kind, name, scale)
    return QuantizedLayer(plan=layer, weight=quantized, inverse_smooth=inverse, down=down, up=up)


def _check_shapes(group: str, shapes: Mapping[str, tuple[int, ...]], plan: QuantizationPlan) -> None:
    for suffix, shape in shapes.items():
        tensor = plan.tensor(group, suffix)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SpecError(
                f"plan, {group}.{suffix}: got shape {tuple(tensor.shape)}; expected {shape}. Calibrate this model again."
            )


def check_plan(plan: QuantizationPlan, groups: Mapping[str, Sequence[str]]) -> None:
    """groups: of the model. Raises SpecError for a group that it has not, naming the nearest, and for nvfp4 without its scale."""
    for group, layer in plan.layers.items():
        if group not in groups:
            close = difflib.get_close_matches(group, groups, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise SpecError(
                f"plan: got the group {group!r}; {hint}The model has {len(groups)}, such as {next(iter(groups), None)!r}."
            )
        if layer.format == "nvfp4" and layer.input_scale is None:
            raise SpecError(
                f"plan, {group}: got nvfp4 without input_scale; expected the scale of its block scales, which is the largest "
                f"activation / {NVFP4_RANGE:g}. Calibrate it."
            )


def uniform_plan(kind: Format, groups: Mapping[str, object], scales: Mapping[str, float] | None = None) -> QuantizationPlan:
    """All groups alike. scales: of each group's activations; None: found while it runs, a scale a token."""
    layers = {group: LayerPlan(format=kind, input_scale=None if scales is None else scales[group]) for group in groups}
    return QuantizationPlan(layers=layers)


def static_scale(kind: Format, largest: float) -> float:
    """Of activations whose largest absolute value is `largest`."""
    return largest / {"int8": 127.0, "fp8": 448.0, "nvfp4": NVFP4_RANGE}[kind]


class Products(TorchFunctionMode):
    """Sees the products of a transformer's groups: F.linear and 1x1 convolutions with a weight, or with q's, k's and v's joined."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        parameters = dict(transformer.named_parameters())
        self.groups = groups_of(parameters)
        self.parts = {group: [parameters[name] for name in names] for group, names in self.groups.items()}
        self._rows: dict[int, tuple[str, slice]] = {}  # by a weight's address, which its views share
        for group, parts in self.parts.items():
            start = 0
            for part in parts:
                self._rows[part.data_ptr()] = group, slice(start, start + part.shape[0])
                start += part.shape[0]
        self._joined: dict[
            int, tuple[str, Tensor]
        ] = {}  # by id, as long as the product's weight lives; kept, so that the id is its

    def compute(self, group: str, rows: slice, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x (…, depth) -> (…, columns); None: as PyTorch does."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat:
            return self._cat(func, args, kwargs)
        if func is F.linear or func is F.conv2d:
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            found = self._group_of(weight)
            if found is not None:
                if func is F.linear:
                    out = self.compute(*found, x, bias)
                else:
                    out = self.compute(*found, x.permute(0, 2, 3, 1), bias)
                    out = None if out is None else out.permute(0, 3, 1, 2)
                if out is not None:
                    return out
        return func(*args, **kwargs)

    def _cat(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        found = [self._group_of(part) for part in args[0]]
        if found and all(each is not None for each in found):
            groups = {each[0] for each in found if each is not None}
            if len(groups) == 1 and out.shape[0] == sum(part.shape[0] for part in self.parts[min(groups)]):
                self._joined = {id(out): (min(groups), out)}
        return out

    def _group_of(self, weight: Any) -> tuple[str, slice] | None:
        if not isinstance(weight, Tensor):
            return None
        joined = self._joined.get(id(weight))
        return (joined[0], slice(None)) if joined is not None else self._rows.get(weight.data_ptr())


class QuantizedLinears(Products):
    """Inside `with QuantizedLinears(transformer, plan):` the planned groups compute as planned; all else is as it was.

    transformer: with weights, which are quantised here, once. Raises SpecError for a plan that is not of it, CheckpointError for a
    weight that has no range.
    """

    def __init__(self, transformer: nn.Module, plan: QuantizationPlan) -> None:
        super().__init__(transformer)
        check_plan(plan, self.groups)
        with torch.no_grad():
            self._layers = {
                group: quantize_layer(plan, group, torch.cat([part.flatten(1) for part in self.parts[group]]))
                for group, layer in plan.layers.items()
                if layer.format != "none"
            }

    def compute(self, group: str, rows: slice, x: Tensor, bias: Tensor | None) -> Tensor | None:
        layer = self._layers.get(group)
        return None if layer is None else layer.product(x, rows, bias)


class Largest:
    """The largest absolute value of each group's activations."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def see(self, group: str, x: Tensor) -> None:
        largest = x.abs().amax().float()
        self._found[group] = torch.maximum(largest, self._found.get(group, largest))

    def of(self, groups: Iterable[str]) -> dict[str, float]:
        """In the order in which they ran. Raises CheckpointError for one that never did, or whose activations are all zero,
        infinite or NaN: the first such, where the others' trouble comes from."""
        for group in groups:
            if group not in self._found:
                raise CheckpointError(f"{group}: got no activations; expected the model to have run with some.")
        return {group: finite_range(largest, f"{group}, activations") for group, largest in self._found.items()}


class InputRanges(Products):
    """Inside `with InputRanges(transformer) as ranges:` notes the largest absolute value of each group's activations."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        self._largest = Largest()

    def compute(self, group: str, rows: slice, x: Tensor, bias: Tensor | None) -> None:
        self._largest.see(group, x)

    def largest(self) -> dict[str, float]:
        """By group. Raises CheckpointError as `Largest.of` does."""
        return self._largest.of(self.groups)
