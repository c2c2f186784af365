"""A model from a config and a source of tensors: compared first, then assigned, with no memory for weights that are thrown away."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from engines.errors import CheckpointError
from sana_ref.tensors import TensorSource, load_tensor

__all__ = ["build", "check_fit", "empty"]

Model = TypeVar("Model", bound=nn.Module)


def empty(make: Callable[[], Model]) -> Model:
    """The model with shapes and without memory."""
    with torch.device("meta"):
        return make()


def check_fit(model: nn.Module, source: TensorSource, where: str) -> None:
    """Compare names and shapes. Raises CheckpointError naming the first tensor that is missing, left over, or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in source.shapes]
    extra = [name for name in source.shapes if name not in expected]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]!r} of shape {expected[missing[0]]}"
            f"{_nearest(missing[0], extra)}. The weights belong to another config, or the download is not complete."
        )
    quantizers = [name for name in extra if "_quantizer." in name]
    if quantizers:
        raise CheckpointError(
            f"{where}: got {quantizers[0]!r}, a range of ModelOpt: these weights are quantized, and would be quantized again. Use "
            "the repository's unquantized ones."
        )
    if extra:
        raise CheckpointError(
            f"{where}: got {len(extra)} tensors that config.json has no place for, first {extra[0]!r} of shape "
            f"{source.shapes[extra[0]]}{_nearest(extra[0], list(expected))}. Config and weights do not belong together."
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {source.shapes[name]}; expected {shape}, as config.json says. "
                "Config and weights do not belong together."
            )


def build(
    make: Callable[[], Model], source: TensorSource, where: str, dtype: torch.dtype | None, device: str | torch.device
) -> Model:
    """The model with the source's weights, in evaluation mode. dtype None: as stored. Raises CheckpointError as check_fit does."""
    model = empty(make)
    check_fit(model, source, where)
    model.load_state_dict({name: load_tensor(source, name, dtype, device) for name in source.shapes}, assign=True)
    return model.eval()


def _nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f" (nearest: {near[0]!r})" if near else ""
