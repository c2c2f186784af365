"""The settings of what sana-tiny needs beside an autoencoder and a transformer: its captions, and its judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.schema import EnvironmentSettings, ParallelSettings
from train.trainer.settings import TrainerSettings

__all__ = ["SceneRecogniserExperiment", "SceneTextExperiment", "ScenesSettings"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScenesSettings(_Section):
    """Which scenes there are, and what is said of them."""

    sprites: Path  # made by python -m train.tiny.prepare_sprites
    sizes: tuple[tuple[int, int], ...] = Field(min_length=1)  # width, height in px
    nums: tuple[Annotated[int, Field(ge=1)], ...]  # scenes of each size
    captions: int = Field(ge=1)  # of a scene
    length: int = Field(ge=8)  # text positions that the transformer is trained with; a longer caption is an error
    seed: int = Field(ge=0, lt=2**32)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.sizes) != len(self.nums):
            raise ValueError(f"got {len(self.sizes)} sizes and {len(self.nums)} nums; expected one for each size")
        return self


class SceneTextExperiment(_Section):
    """The text encoder alone, on what captions say."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    scenes: ScenesSettings
    size: Literal["tiny", "minuscule"]  # of the encoder: train.tiny.models
    trainer: TrainerSettings
    parallel: ParallelSettings
    env: EnvironmentSettings


class SceneRecogniserExperiment(_Section):
    """The judge: on scenes as composed and as the autoencoders give them back."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    sprites: Path
    autoencoders: tuple[Path, ...] = Field(min_length=1)  # folders in diffusers' layout
    side: int = Field(ge=64, multiple_of=32)  # px of the pictures that are decoded
    decoded: int = Field(ge=1)  # objects alone, for each autoencoder; some more come from scenes of several
    seed: int = Field(ge=0, lt=2**32)
    trainer: TrainerSettings
    parallel: ParallelSettings
    env: EnvironmentSettings
