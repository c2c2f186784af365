"""The processes of a run, as torchrun started them, or one alone; and what they agree on."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engines.errors import SanaError

__all__ = ["Processes", "process_group"]

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # others wait while the first one validates or writes; longer than that, and it hangs


@dataclass(frozen=True, kw_only=True)
class Processes:
    """device: this process's. mesh: over all of them; None for one process. writing: a second group, for what is written while
    training goes on: two threads cannot share one."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    writing: dist.ProcessGroup | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Over processes; in place. One that is not finite anywhere is not finite everywhere."""
        if self.mesh is not None:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is set on one of them."""
        return flag if self.mesh is None else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them; so is a SanaError that it raises. The others wait."""
        if self.mesh is None:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except SanaError as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """All processes that torchrun started (RANK, WORLD_SIZE, … in the environment), or this one: NCCL on GPUs, Gloo on CPUs.

    The group is left at the end, also after an error: those that still wait for this process then fail instead of hanging.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=torch.device(kind))
        return
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    processes = Processes(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        mesh=init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("data",)),
        writing=dist.new_group(backend="gloo", timeout=PATIENCE),
    )
    try:
        yield processes
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        # What holds a group until Python ends would take it down with its threads running, and the process ends with SIGABRT.
        object.__setattr__(processes, "mesh", None)
        object.__setattr__(processes, "writing", None)
        gc.collect()
        dist.destroy_process_group()
