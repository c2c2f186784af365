"""The settings of a training run: checked once, when they are read; a wrong name or value is an error, not a default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from train.trainer.errors import TrainingError

__all__ = ["LrScheduleSettings", "OptimizerSettings", "TrainerSettings", "accumulation"]

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerSettings(_Settings):
    """adamw is PyTorch's; adamw8bit needs the package bitsandbytes; came (arXiv:2307.02047) needs came-pytorch."""

    kind: Literal["adamw", "adamw8bit", "came"] = "adamw"
    lr: Positive = 1e-4  # the schedule's highest
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    beta3: Beta = 0.9999  # CAME's: of the instability
    eps: Positive = 1e-8  # of adamw and adamw8bit; CAME's are 1e-30 and 1e-16
    weight_decay: float = Field(
        default=0.01, ge=0, allow_inf_nan=False
    )  # on matrices and filters, not on biases, norms and vectors


class LrScheduleSettings(_Settings):
    """A linear warm-up to the optimizer's lr, then constant, or down to floor x lr at the last step."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warm_up_steps: int = Field(default=1000, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)


class TrainerSettings(_Settings):
    """A step is one update of the weights, from `batch` pictures of all processes together."""

    folder: Path  # of the checkpoints
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)  # pictures a step
    micro_batch: int = Field(ge=1)  # pictures at once on each GPU; gradients of several are summed to reach `batch`
    seed: int = Field(default=0, ge=0, lt=2**63)
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: LrScheduleSettings = LrScheduleSettings()
    clip: Positive | None = 1.0  # the gradient's largest norm
    ema_decay: float | None = Field(default=0.9999, ge=0, lt=1)  # reached gradually; None: no average
    precision: Literal["fp32", "bf16"] = "bf16"  # of the products; weights, averages and moments are fp32
    activation_checkpointing: bool = False  # compute the blocks twice instead of keeping what is within them
    compile: bool = False
    # The middle of the transformer's mix-FFNs as one kernel, their 1x1 convolutions as products. None: on a GPU in bf16
    fast_feed_forward: bool | None = None
    deterministic: bool = False  # let CUDA's kernels be repeatable, or refuse: a resumed run is exact on a GPU too, and slower
    checkpoint_steps: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)  # checkpoints
    log_steps: int = Field(default=10, ge=1)
    tensorboard: bool = True  # scalars in folder/tensorboard; needs the package tensorboard
    wandb_project: str | None = None  # scalars go to Weights & Biases too; needs the package wandb
    max_non_finite: int = Field(default=10, ge=0)  # losses or gradients in a run; one more stops it


def accumulation(settings: TrainerSettings, world_size: int) -> int:
    """Micro-batches in a step of each process. Raises TrainingError if the processes cannot share the batch evenly."""
    together = settings.micro_batch * world_size
    if settings.batch % together:
        below = settings.batch - settings.batch % together
        remedy = " or ".join(str(n) for n in (below, below + together) if n)
        raise TrainingError(
            f"batch: got {settings.batch}, which {world_size} process{'es' * (world_size > 1)} with a micro_batch of "
            f"{settings.micro_batch} do not divide; expected a multiple of {together}. Use {remedy}, or another micro_batch."
        )
    return settings.batch // together
