"""The processes of a run, as torchrun started them, or one alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Processes"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """device: this process's. mesh: over all of them; None for one process."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
