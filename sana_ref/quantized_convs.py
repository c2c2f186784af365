"""The decoder's FP8 and INT8 in PyTorch: what engines with such convolutions are held against, and what finds their scales.

    with QuantizedConvs(decoder, plan):
        decoder(...)

Both 3x3 convolutions of a residual block are a group each, named as the checkpoint has them: up_blocks.2.1.conv1. Weights are e4m3
or int8 with a scale for each channel out, activations the same with one scale for all pixels and channels, known before: a sum
mixes nine pixels, and the kernel that makes a picture does not see all of it. Sums, bias, activation, norm and residual are fp32,
rounded once (plugins/conv3x3_quantized.py). The rest of the decoder is as it was: the upsampling convolutions would cost more than
all of these (docs/quantization.md).

A kernel quantises what it has not yet rounded to 16 bits; here that was, which is a sixteenth of e4m3's own rounding, and of
int8's at most a half, where the number is the largest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sana_ref.conv_ops  # noqa: F401  registers the ops
from engines.errors import SpecError
from sana_ref.quantization import QuantizationPlan
from sana_ref.quantize_ops import INT8_MAX, Rows, quantize_weight, round_static
from sana_ref.quantized import MARGIN, Largest, check_plan, static_scale, uniform_plan

__all__ = ["MARGINS", "ConvRanges", "Convs", "QuantizedConvs", "conv_group", "conv_groups", "conv_plan"]

# How many times the parity check's noise a scale leaves room for: latents of pictures put up to 4.4 times as much into a layer
# (sana-tiny, 16 pictures; docs/quantization.md). FP8 has room for more at no cost; INT8 loses a bit for each factor of two.
MARGINS: Mapping[Rows, float] = {"fp8": MARGIN, "int8": 4.0}

_GROUPS = re.compile(r"(?:^|\.)(up_blocks\.\d+\.\d+\.conv[12])\.weight$")
_FUSED = (torch.ops.sana.conv3x3, torch.ops.sana.conv3x3_norm)  # of sana_ref/fused_decoder.py: channels last


def conv_group(parameter: str) -> str | None:
    """The group of a parameter's name, such as decoder.up_blocks.2.1.conv1.weight; None for all others."""
    found = _GROUPS.search(parameter)
    return None if found is None else found[1]


def conv_groups(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Group: the name of its weight, alone; as sana_ref.quantization.groups_of has it."""
    return {group: [name] for name in parameters if (group := conv_group(name)) is not None}


def conv_plan(kind: Rows, largest: Mapping[str, float], margin: float) -> QuantizationPlan:
    """All groups in one format. largest: absolute value of each one's input, as ConvRanges has it; the scale leaves room for
    `margin` times that."""
    return uniform_plan(kind, largest, {group: static_scale(kind, margin * each) for group, each in largest.items()})


class Convs(TorchFunctionMode):
    """Sees the convolutions of a decoder's groups: of `Decoder`, or of a `FusedDecoder`, which has the same parameters."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        parameters = dict(decoder.named_parameters())
        self.groups = conv_groups(parameters)
        self.weights = {group: parameters[name] for group, (name,) in self.groups.items()}  # (N, C, 3, 3)
        self._group_by_address = {weight.data_ptr(): group for group, weight in self.weights.items()}  # which a view shares

    def operands(self, group: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Those to convolve in fp32: x, and the weight (N, C, 3, 3). None: as PyTorch does."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d or func in _FUSED:
            x, weight, *rest = args
            group = self._group_by_address.get(weight.data_ptr())
            found = None if group is None else self.operands(group, x)
            if found is not None:
                wide, real = found
                real = real if func is F.conv2d else real.permute(0, 2, 3, 1)
                rest = [each.float() if isinstance(each, Tensor) else each for each in rest]
                return func(wide, real, *rest, **(kwargs or {})).to(x.dtype)
        return func(*args, **(kwargs or {}))


class QuantizedConvs(Convs):
    """Inside `with QuantizedConvs(decoder, plan):` the planned groups compute as planned; all else is as it was.

    decoder: with weights, which are quantised here, once. Raises SpecError for a plan that is not of it, CheckpointError for a
    weight that has no range.
    """

    def __init__(self, decoder: nn.Module, plan: QuantizationPlan) -> None:
        super().__init__(decoder)
        check_plan(plan, self.groups)
        self._layers: dict[str, tuple[Rows, float, Tensor]] = {}
        for group, layer in plan.layers.items():
            if layer.format != "none":
                if layer.format == "nvfp4" or layer.input_scale is None:
                    raise SpecError(f"plan, {group}: got {layer}; expected fp8 or int8 with an input_scale. Find the scales again.")
                weight = _rounded(self.weights[group], layer.format, self.groups[group][0])
                self._layers[group] = layer.format, layer.input_scale, weight

    def operands(self, group: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if group not in self._layers:
            return None
        kind, scale, weight = self._layers[group]
        wide = x.float()
        if kind == "int8":
            wide = wide.clamp(min=-INT8_MAX * scale)  # kernels have no -128
        return round_static(wide, kind, scale), weight


def _rounded(weight: Tensor, kind: Rows, name: str) -> Tensor:
    """(N, C, 3, 3) fp32, quantised with a scale for each channel out and dequantised."""
    with torch.no_grad():
        return quantize_weight(weight.flatten(1), kind, name).real().view(weight.shape)


class ConvRanges(Convs):
    """Inside `with ConvRanges(decoder) as ranges:` notes the largest absolute value of each group's input."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(decoder)
        self._largest = Largest()

    def operands(self, group: str, x: Tensor) -> None:
        self._largest.see(group, x)

    def largest(self) -> dict[str, float]:
        """By group. Raises CheckpointError as `Largest.of` does."""
        return self._largest.of(self.groups)
