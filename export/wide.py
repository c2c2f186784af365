"""fp64 as the reference of fp32: run a model that computes its statistics "in fp32" in double precision instead.

The models write `.float()` where a 16-bit type would not do. Judged against themselves in fp32 those places would look exact, and
the bound of an fp32 build would be too tight; so under this mode fp32 means fp64 throughout.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Float64Mode"]


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Float64Mode(TorchFunctionMode):
    """Inside `with Float64Mode():` every request for fp32 is answered in fp64. The model and its inputs must be fp64 already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*(_wide(arg) for arg in args), **{name: _wide(value) for name, value in (kwargs or {}).items()})
