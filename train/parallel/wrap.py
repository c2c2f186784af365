"""One model on many processes: DDP keeps a whole copy on each, FSDP2 a share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sana_ref.transformer import SanaTransformer2DModel

__all__ = ["clip_grad_norm", "no_sync", "per_process", "process_group", "unwrapped", "wrap"]


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[DeviceMesh]:
    """A mesh over all processes that torchrun started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment): NCCL on
    GPUs, Gloo on CPUs. It is left at the end, also after an error."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def per_process(batch_size: int, world_size: int, accumulation: int = 1) -> int:
    """Pictures of a micro-batch on each process. Raises ValueError if they cannot be dealt out evenly."""
    share, rest = divmod(batch_size, world_size * accumulation)
    if rest or not share:
        raise ValueError(
            f"batch_size: got {batch_size} for {world_size} processes x {accumulation} micro-batches; expected a multiple of "
            f"{world_size * accumulation}, so that every process sees as many pictures. The next is "
            f"{(share + 1) * world_size * accumulation}."
        )
    return share


def wrap(
    model: SanaTransformer2DModel, strategy: Literal["single", "ddp", "fsdp2"], mesh: DeviceMesh | None, *, bf16: bool
) -> nn.Module:
    """The model as `strategy` runs it. Make the optimizer afterwards: FSDP2 replaces the parameters by shares of them.

    bf16: FSDP2 gathers parameters in bf16 and sums gradients in fp32; under DDP autocast does as much. Each block is a unit that is
    gathered when it computes.
    """
    if strategy == "single":
        return model
    assert mesh is not None, "ddp and fsdp2 need a mesh: process_group()"
    if strategy == "ddp":
        device_ids = [torch.cuda.current_device()] if mesh.device_type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


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
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
