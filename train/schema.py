"""The schema of a training experiment: what configs/train.yaml, its groups and an experiment on top may say.

    settings = load("sana_600m_1024px", ["trainer.optimizer.lr=2e-5"])
    python -m train.schema sana_600m_1024px trainer.optimizer.lr=2e-5     # check, and say what is wrong

Sections that belong to one package are defined there, and only put together here. Nothing here imports PyTorch but
`transformer_config`, so that a mistake in a file is found before anything is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.config import ConfigError, compose_experiment, validate
from runtime.schedule_file import ScheduleFile
from train.data.settings import DataSettings
from train.objective.settings import ObjectiveSettings
from train.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from sana_ref.transformer import SanaTransformerConfig

__all__ = [
    "EnvironmentSettings",
    "ExperimentSettings",
    "ModelSettings",
    "ParallelSettings",
    "TransformerSettings",
    "ValidationSettings",
    "VariantName",
    "load",
    "transformer_config",
]

# Those of sana_ref.variants, which imports PyTorch; a test holds the two together.
VariantName = Literal[
    "sana_600m_512px",
    "sana_600m_1024px",
    "sana_1600m_512px",
    "sana_1600m_1024px",
    "sana_1600m_2kpx",
    "sana_1600m_4kpx",
    "sana_1_5_1600m_1024px",
    "sana_1_5_4800m_1024px",
    "sprint_600m_1024px",
    "sprint_1600m_1024px",
]
TASK = "transformer"
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TransformerSettings(_Section):
    """A transformer of one's own: the fields and defaults of sana_ref.transformer.SanaTransformerConfig, which checks them."""

    in_channels: Count = 32
    out_channels: Count | None = 32
    num_attention_heads: Count = 70
    attention_head_dim: Count = 32
    num_layers: Count = 20
    num_cross_attention_heads: Count = 20
    cross_attention_head_dim: Count = 112
    cross_attention_dim: Count = 2240
    caption_channels: Count = 2304
    mlp_ratio: float = Field(2.5, gt=0, allow_inf_nan=False)
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: Count = 32  # latent cells a side
    patch_size: Count = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = Field(1e-6, gt=0, allow_inf_nan=False)
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: Literal["rms_norm_across_heads"] | None = None
    timestep_scale: float = Field(1.0, gt=0, allow_inf_nan=False)


class ModelSettings(_Section):
    """What is trained: a published architecture by its name, or one's own. Exactly one of them."""

    variant: VariantName | None = None
    transformer: TransformerSettings | None = None
    checkpoint: str | None = None  # a folder or Hub id to start from; None: new weights

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.variant is None) == (self.transformer is None):
            what = "neither" if self.variant is None else "both"
            raise ValueError(f"got {what} of variant and transformer; expected one of them. Set the other to null")
        return self


class ParallelSettings(_Section):
    """How the work is spread. auto: from the model's size and the memory there is (train.parallel.reckoning)."""

    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"


class ValidationSettings(_Section):
    """Pictures drawn while training, by `schedule`, and their scores. Without a model, or prompts and judge, there are none."""

    every: Count = 1000  # steps
    prompts: tuple[str, ...] = ()
    guidance_scale: float = Field(4.5, ge=1, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)  # of the first picture, the next integer for the next
    model: str | None = None  # folder or Hub id with vae, text_encoder and tokenizer; None: model.checkpoint
    side: Count | None = None  # px; None: the data's resolution
    judge: Path | None = None  # a folder with recogniser/ and held_out_captions.json, such as models/sana-tiny
    judged: Count = 20  # captions of each kind that the judge is shown


class EnvironmentSettings(_Section):
    """Where the run happens."""

    name: Literal["local", "cluster", "ci"]
    data: Path  # what an experiment trains on unless it says otherwise
    out: Path  # each run makes a folder in it
    num_workers: int = Field(ge=0)  # threads that read data, for each GPU; 0: the training loop reads


class ExperimentSettings(_Section):
    """All of it."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")  # also of the run's folder in env.out
    model: ModelSettings
    data: DataSettings
    objective: ObjectiveSettings
    parallel: ParallelSettings
    trainer: TrainerSettings
    validation: ValidationSettings
    schedule: ScheduleFile  # of the sampler that validates
    env: EnvironmentSettings


def load(experiment: str, overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> ExperimentSettings:
    """The settings of configs/experiment/EXPERIMENT.yaml with `overrides`. Raises ConfigError, also for one of another task."""
    composed = compose_experiment(experiment, overrides, config_dir)
    task = composed.values.pop("task", TASK)
    if task != TASK:
        raise ConfigError(
            f"{experiment}: task: got {task!r} ({composed.origins.of(['task'])}); expected an experiment of a transformer. "
            "train.tasks.load reads all of them, and so does python -m train.run"
        )
    return validate(composed, ExperimentSettings)


def transformer_config(model: ModelSettings) -> SanaTransformerConfig:
    """The transformer that `model` names. Imports PyTorch."""
    from sana_ref.transformer import SanaTransformerConfig
    from sana_ref.variants import VARIANTS

    if model.transformer is not None:
        return SanaTransformerConfig(**model.transformer.model_dump())
    return VARIANTS[str(model.variant)].transformer


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the experiment fits the schema of its task; 2 with the message if not. A transformer's needs no PyTorch."""
    parser = argparse.ArgumentParser(prog="python -m train.schema", description="Check an experiment's configuration.")
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-dir", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        what = arguments.experiment, arguments.overrides, arguments.config_dir
        if compose_experiment(*what).values.get("task", TASK) == TASK:
            load(*what)
        else:
            from train import tasks

            tasks.load(*what)
    except ConfigError as error:
        print(f"sana: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.experiment}: fits the schema", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
