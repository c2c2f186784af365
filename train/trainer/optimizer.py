"""Optimizers from the packages that keep them, and the learning rate as a function of the step alone.

bitsandbytes and came-pytorch (the CAME authors' package, small and seldom released) are optional and load when asked for.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import nn

from train.trainer.errors import TrainingError
from train.trainer.settings import LrScheduleSettings, OptimizerSettings

__all__ = ["learning_rate", "make_optimizer"]

PACKAGES = {
    "adamw8bit": ("bitsandbytes.optim", "bitsandbytes"),
    "came": ("came_pytorch", "came-pytorch"),
}  # module, name to install
CAME_EPS = (1e-30, 1e-16)


def _optional(kind: str) -> Any:
    module, package = PACKAGES[kind]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainingError(
            f"optimizer.kind: got {kind!r}, and the package {package} cannot be imported ({error}). Run pip install {package}, "
            "or use adamw."
        ) from None


def make_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Over the parameters that are trained. Raises TrainingError if the optimizer's package is not installed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.kind == "came":
        came: torch.optim.Optimizer = _optional("came").CAME(
            groups, lr=settings.lr, betas=(*settings.betas, settings.beta3), eps=CAME_EPS
        )
        return came
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.kind == "adamw8bit":
        in_8_bits: torch.optim.Optimizer = _optional("adamw8bit").AdamW8bit(groups, **options)
        return in_8_bits
    return torch.optim.AdamW(groups, fused=all(p.is_cuda for p in trained), **options)


def learning_rate(schedule: LrScheduleSettings, peak: float, step: int, steps: int) -> float:
    """Of step 0 to steps - 1."""
    if step < schedule.warm_up_steps:
        return peak * (step + 1) / schedule.warm_up_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - schedule.warm_up_steps) / max(1, steps - 1 - schedule.warm_up_steps)
    falling = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.floor + (1 - schedule.floor) * falling)
