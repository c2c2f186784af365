"""Products and convolutions of 16-bit numbers on a CPU as a GPU computes them: summed in fp32, rounded once.

    with HalfProducts():
        reference.generate(...)          # a SanaReference in fp16

PyTorch's own loops for fp16 on a CPU take seven times as long as those for fp32, with which these are computed. Weights are widened
once. Softmax attention is left to PyTorch, which sums in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["HalfProducts"]

_HALF = frozenset({torch.float16, torch.bfloat16})
_PRODUCTS = frozenset({F.linear, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__})


class HalfProducts(TorchFunctionMode):
    """Inside, products of fp16 or bf16 are of fp32 numbers, and their result is rounded to the type that they had."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}  # by id, as long as the weight is kept here; and in fp32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or args[0].dtype not in _HALF:
            return func(*args, **kwargs)
        wide = func(*(self._widened(arg) for arg in args), **{name: self._widened(value) for name, value in kwargs.items()})
        return wide.to(args[0].dtype)

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in _HALF:
            return value
        if not isinstance(value, nn.Parameter):
            return value.float()
        if id(value) not in self._weights:
            self._weights[id(value)] = value, value.detach().float()
        return self._weights[id(value)][1]
