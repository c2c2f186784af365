"""FP8 linear layers in PyTorch: what an engine of that precision is held against.

Numbers are e4m3 times a scale a row, of activations as of weights: a row's largest number becomes 448, the largest of e4m3. A
layer's activations may have one scale for all rows instead.
Products are summed in fp32 and rounded once, to the layer's own type. Which layers: export/fp8_nodes.py.
"""

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sana_ref.quantization import group_of

__all__ = ["LARGEST", "Fp8Linears", "quantize_rows"]

LARGEST = 448.0  # of e4m3
LEAST_SCALE = 2.0**-126  # as plugins/fp8_quantize.py has it


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, D) as bits (…, D) float8_e4m3fn and scale (…) fp32: x is about bits * scale."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE)
    return (wide * (1.0 / scale)[..., None]).to(torch.float8_e4m3fn), scale


def _rounded(x: Tensor, scale: float | None = None) -> Tensor:
    """x as FP8 has it, in fp32. scale: one for all rows, beyond 448 times which numbers are cut off; None: each row's own."""
    if scale is None:
        bits, scales = quantize_rows(x)
        return bits.float() * scales[..., None]
    factor = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return (x.float() * (1.0 / factor)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * factor


class Fp8Linears(TorchFunctionMode):
    """Inside `with Fp8Linears(transformer):` the linear layers of its blocks compute in FP8; all else is as it was.

    input_scales: by group of layers (sana_ref/quantization.py), one for all tokens, as export/fp8_nodes.py's `use_fp8` takes them.

    Also those whose weight is a view of a block's parameter, or several of them joined: so the blocks call them when fused.
    """

    def __init__(self, transformer: nn.Module, input_scales: Mapping[str, float] = MappingProxyType({})) -> None:
        super().__init__()
        blocks: Any = transformer.transformer_blocks
        self._weights = {
            parameter.untyped_storage().data_ptr(): input_scales.get(group_of(f"transformer_blocks.{name}") or "")
            for name, parameter in blocks.named_parameters()
        }
        self._joined: dict[int, weakref.ref[Tensor]] = {}  # by id, which is given to another tensor once this one is gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat and all(self._is_weight(part) for part in args[0]):
            joined = func(*args, **kwargs)
            self._joined[id(joined)] = weakref.ref(joined)
            return joined
        if func is F.linear and self._is_weight(args[1]):
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            out = F.linear(_rounded(x, self._weights.get(weight.untyped_storage().data_ptr())), _rounded(weight))
            return (out if bias is None else out + bias.float()).to(x.dtype)
        return func(*args, **kwargs)

    def _is_weight(self, tensor: Tensor) -> bool:
        joined = self._joined.get(id(tensor))
        return tensor.untyped_storage().data_ptr() in self._weights or (joined is not None and joined() is tensor)
