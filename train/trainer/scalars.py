"""Where the numbers of a run go beside its log: TensorBoard, and Weights & Biases if a project is named."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from typing import Any

from train.parallel.processes import Processes
from train.trainer.errors import TrainingError
from train.trainer.settings import TrainerSettings

__all__ = ["Scalars"]


class Scalars:
    """The first process writes them. Raises TrainingError on all if a package is wanted that is not installed."""

    def __init__(self, settings: TrainerSettings, first_step: int, config: Mapping[str, Any], processes: Processes) -> None:
        self.writer: Any = None
        self.run: Any = None
        processes.first(lambda: self._open(settings, first_step, config))

    def _open(self, settings: TrainerSettings, first_step: int, config: Mapping[str, Any]) -> None:
        if settings.wandb_project is not None:
            self.run = _wandb_run(settings, settings.wandb_project, config)
        if settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise TrainingError(
                    f"tensorboard: got true, and it cannot be imported ({error}). Run pip install tensorboard, or set it to false."
                ) from None
            self.writer = SummaryWriter(str(settings.folder / "tensorboard"), purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        if self.writer is not None:
            for name, value in named.items():
                self.writer.add_scalar(name, value, step)
        if self.run is not None:
            self.run.log(named, step=step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def _wandb_run(settings: TrainerSettings, project: str, config: Mapping[str, Any]) -> Any:
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise TrainingError(
            f"wandb_project: got {project!r}, and wandb cannot be imported ({error}). Run pip install wandb, or set it to null."
        ) from None
    settings.folder.mkdir(parents=True, exist_ok=True)
    identity = settings.folder / "wandb_id"  # a resumed run goes on in the same curves
    if not identity.exists():
        identity.write_text(secrets.token_hex(8), encoding="utf-8")
    return wandb.init(
        project=project,
        name=settings.folder.name,
        id=identity.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(settings.folder),
        config=dict(config),
    )
