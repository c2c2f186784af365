"""Training state on many processes: written in shares, read on any number of processes, and as one file for everything else.

The format is PyTorch's distributed checkpoint (DCP). A checkpoint is written under a temporary name and renamed when every process
has written its share, so that one with its final name is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from train.parallel.wrap import unwrapped

__all__ = ["load", "save", "save_async", "to_dcp", "to_safetensors"]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """One process is no mistake here: without PyTorch's warning that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """By the checkpoint's names, whatever wraps the model."""
    model_state, optimizer_state = get_state_dict(unwrapped(model), optimizer if optimizer is not None else ())
    return {"model": model_state} | ({"optimizer": optimizer_state} if optimizer is not None else {})


def _temporary(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def _clear(folder: Path) -> None:
    if _rank() == 0:
        shutil.rmtree(_temporary(folder), ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    _barrier()


def _finish(folder: Path) -> None:
    _barrier()
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(_temporary(folder), folder)
    _barrier()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write `folder`. All processes call it; returns when the checkpoint has its name. Raises OSError as the file system does."""
    _clear(folder)
    with _alone_is_fine():
        dcp.save(_state(model, optimizer), checkpoint_id=_temporary(folder))
    _finish(folder)


def save_async(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """As save(), while training goes on: the state is copied to host memory before this returns, and written behind it.

    All processes call the function that is returned, before the next save and before they end: it waits and renames. The process
    group must have a CPU backend ("cpu:gloo,cuda:nccl").
    """
    _clear(folder)
    future = dcp.async_save(_state(model, optimizer), checkpoint_id=_temporary(folder))

    def finish() -> None:
        future.result()
        _finish(folder)

    return finish


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Into `model` and `optimizer`, which may be wrapped in another way and on another number of processes than when it was saved.

    Raises FileNotFoundError if there is no such checkpoint.
    """
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder}: got no distributed checkpoint; expected a folder with .metadata and shares")
    state = _state(model, optimizer)
    with _alone_is_fine():
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        unwrapped(model),
        optimizer if optimizer is not None else (),
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )


def to_safetensors(folder: Path, model: nn.Module, out: Path, *, dtype: torch.dtype | None = None) -> None:
    """A checkpoint's weights as one file in diffusers' names; one process, on the CPU. model: of the config, with memory.

    out: such as transformer/diffusion_pytorch_model.safetensors; config.json beside it is the caller's. dtype: None keeps fp32.
    """
    load(folder, model)
    weights = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in model.state_dict().items()}
    temporary = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, out)


def to_dcp(file: Path, model: nn.Module, folder: Path) -> None:
    """The way back: one safetensors file becomes a checkpoint that any number of processes loads, without optimizer state.

    Raises ValueError if names or shapes are not the model's.
    """
    weights = load_file(file)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        name = min(set(found.items()) ^ set(expected.items()))[0]
        raise ValueError(
            f"{file}, {name!r}: got shape {found.get(name)}; the model has {expected.get(name)}. Is the config its own?"
        )
    model.load_state_dict(_as(weights, model))
    save(folder, model)


def _as(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: weights[name].to(tensor.dtype) for name, tensor in model.state_dict().items()}
