"""Scales of activations in FP8, calibrated: the largest number that went into a layer while the build's references ran.

For the layers whose input comes from a kernel that sees only a part of a token and cannot find its largest number
(plugins/static_scale.py). e4m3 is a floating format: with a scale that is MARGIN times too large, numbers keep their digits down to
1/3600 of the largest that was seen, and what is smaller errs by less than 1/57000 of it. What is larger still is cut off.
"""

import re
import weakref
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sana_ref.fp8 import LARGEST
from sana_ref.quantization import group_of

__all__ = ["MARGIN", "InputScales"]

MARGIN = 8.0  # over the largest number of the references, which are few and of the smallest pictures
_LAYERS = re.compile(r"(attn1\.to_out\.0|attn2\.to_out\.0|ff\.conv_point)$")


class InputScales(TorchFunctionMode):
    """Inside `with InputScales(transformer) as found:` notes the largest input of each such layer. Several times: of all.

    Also inside export/wide.py's mode, entered before, for which a reshaped weight is a copy.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        blocks: Any = transformer.transformer_blocks
        named = {f"transformer_blocks.{name}": parameter for name, parameter in blocks.named_parameters()}
        groups = {name: group_of(name) for name in named}
        self._groups = {id(named[name]): group for name, group in groups.items() if group and _LAYERS.search(group)}
        self._parameters = named  # alive, so that their ids stay theirs
        self._flat: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._largest: dict[str, float] = dict.fromkeys(self._groups.values(), 0.0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.flatten and (group := self._group(args[0])):
            self._flat[id(result)] = weakref.ref(result), group
        elif func is F.linear and (group := self._group(args[1])):
            self._largest[group] = float(np.maximum(self._largest[group], args[0].abs().amax().item()))  # keeps NaN
        return result

    def _group(self, tensor: Tensor) -> str | None:
        flat, group = self._flat.get(id(tensor), (None, None))
        return group if flat is not None and flat() is tensor else self._groups.get(id(tensor))

    def scales(self) -> dict[str, float]:
        """By group, numbers that fp32 holds. Raises ValueError where a layer did not run, or its input was zero or no number."""
        for group, largest in self._largest.items():
            if not 0 < largest < np.inf:
                raise ValueError(
                    f"{group}: got inputs up to {largest} in the references; expected a number above 0, to scale it by"
                )
        return {group: float(np.float32(largest * MARGIN / LARGEST)) for group, largest in self._largest.items()}
