"""What `train.run` can train. An experiment says which in its key `task`; each has a schema, a root in configs/ and a run.

A task's module offers SETTINGS, a pydantic model with a `name`, a `trainer: TrainerSettings` and a `parallel`, and
make_trainer(settings, processes=…, log=…).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.config import ConfigError, compose_experiment, validate

if TYPE_CHECKING:
    from train.trainer.loop import Trainer

__all__ = ["TASKS", "load"]

TASKS: Mapping[str, str] = {  # task -> module; the root of its configuration is configs/train_TASK.yaml, or train.yaml
    "transformer": "train.transformer",
    "autoencoder": "train.autoencoder.run",
    "scene_text": "train.tiny.text",
    "scene_recogniser": "train.tiny.recogniser_run",
}


def load(
    experiment: str, overrides: Sequence[str] = (), config_dir: Path | str | None = None
) -> tuple[Any, Callable[..., Trainer]]:
    """The settings of an experiment and what makes its run. Raises ConfigError."""
    composed = compose_experiment(experiment, overrides, config_dir)
    task = composed.values.pop("task", "transformer")
    if task not in TASKS:
        raise ConfigError(f"{experiment}: task: got {task!r}; expected one of {', '.join(TASKS)}.")
    module = importlib.import_module(TASKS[task])
    return validate(composed, module.SETTINGS), module.make_trainer
