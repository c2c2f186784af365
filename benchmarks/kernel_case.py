"""What benchmarks/kernel_plans.py times: a kernel at a size, the plans that are tried, and a call for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["DEVICE", "SHARED", "Call", "Case", "Plan", "grid_of", "half", "to_fp8"]

DEVICE = "cuda"
SHARED = 227 * 1024  # bytes a block may have on compute capability 9.0
Call = Callable[[], object]
Plan = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A kernel at a size. launch: a call for a plan. peer: another's program for the same, by name."""

    name: str
    plans: list[Plan]
    launch: Callable[[Plan], Call]
    source: Plan
    peers: Mapping[str, Call] = field(default_factory=dict)


def grid_of(**choices: tuple[Any, ...]) -> list[Plan]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def half(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def to_fp8(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For an output of that shape: bits, and a scale a row."""
    return torch.empty(*shape, device=DEVICE, dtype=torch.int8), torch.empty(*shape[:-1], device=DEVICE)
