"""One model on many processes: DDP keeps a whole copy on each, FSDP2 a share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from train.parallel.processes import Processes

__all__ = ["Strategy", "clip_grad_norm", "local", "no_sync", "placed", "replicate", "unwrapped", "whole", "wrap"]

Strategy = Literal["single", "ddp", "fsdp2"]


def wrap(model: nn.Module, strategy: Strategy, processes: Processes, *, bf16: bool) -> nn.Module:
    """The model as `strategy` runs it. Make the optimizer afterwards: FSDP2 replaces the parameters by shares of them.

    bf16: FSDP2 gathers parameters in bf16 and sums gradients in fp32. Both strategies are called under autocast, and FSDP2 casts no
    inputs: it would round the times, 0 to 1000, to 8 bits. Each block is a unit that is gathered when it computes; activation
    checkpointing and compilation come before, so that what is gathered for the backward pass serves a block's second forward pass.
    """
    if strategy == "single" or isinstance(model, DistributedDataParallel | FSDPModule):
        return model
    assert processes.mesh is not None, "ddp and fsdp2 need a mesh: process_group()"
    if strategy == "ddp":
        # cuDNN gives gradients of 1 x 1 filters strides of their own, of axes with one element: nobody is helped by a warning.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        device_ids = [processes.device] if processes.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb(model))
    # The output is a view, which would be wrong to change in place; objectives do not.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32 if bf16 else None, cast_forward_inputs=False
    )
    blocks: nn.ModuleList = model.transformer_blocks  # type: ignore[assignment]
    for block in blocks:
        fully_shard(block, mesh=processes.mesh, mp_policy=policy)
    fully_shard(model, mesh=processes.mesh, mp_policy=policy)
    return model


def bucket_mb(model: nn.Module) -> float:
    """Of DDP's gradients that are summed at once.

    A sum takes multiprocessors away from the matrix products beside it: few large ones cost less than PyTorch's of 25 MB, and
    sixteenths of a model still overlap.
    """
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return min(400.0, max(25.0, gradients / 16e6))


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """DDP, or the model itself for one process: what any model can be trained with that is called as a whole."""
    return wrap(model, "ddp" if processes.world_size > 1 else "single", processes, bf16=False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model with the names of a checkpoint."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def no_sync(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around one micro-batch's forward and backward pass: gradients are only summed over the processes in the last one."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        yield


def clip_grad_norm(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients so that their norm over all processes is at most `limit`. Returns the norm before, on each process."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This process's share, or the tensor itself if it is whole; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if `like` is one of the same shape."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Put shares together, on the first process and in host memory; all processes call it. The others get what was whole."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if full is tensor or processes.rank == 0:
            found[name] = full if full is tensor else full.cpu()
    return found
