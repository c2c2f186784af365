"""Run a model in a wider type than its weights are stored in, without a wider copy of them.

Under the mode every floating tensor that enters an operation is widened first, a weight only while the operation lasts, and every
request for a narrower type is answered with the wide one. So the reference of a network of several gigabytes needs little more
memory than its mapped file; and fp64 means fp64 throughout, also where the model asks for fp32 because 16 bits would not do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Wide"]

_NARROWER = {
    torch.float32: frozenset({torch.float16, torch.bfloat16}),
    torch.float64: frozenset({torch.float16, torch.bfloat16, torch.float32}),
}


class Wide(TorchFunctionMode):
    """Inside `with Wide(torch.float64):` all floating arithmetic is fp64. Also for fp32, under which 16 bits are widened."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._narrower = _NARROWER[dtype]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func is Tensor.data_ptr:  # an attribute: nothing is computed
            return func(*args, **kwargs)
        if func is F.embedding:  # widen the rows that are looked up, not the table
            return self._widened(func(*args, **kwargs))
        if func is Tensor.float:
            return self._widened(args[0])
        return func(*(self._widened(arg) for arg in args), **{name: self._widened(value) for name, value in kwargs.items()})

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.dtype in self._narrower else value
        if isinstance(value, torch.dtype):
            return self.dtype if value in self._narrower else value
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(self._widened(each) for each in value)
        return value
