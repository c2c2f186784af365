"""The settings of training data: checked once, when they are read; a wrong name or value is an error, not a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from train.data.errors import DataError

__all__ = ["MAX_PIXELS", "DataSettings", "Kind", "Resolution"]

MAX_PIXELS = 178_956_970  # where Pillow itself takes a picture for an attack
Kind = Literal["auto", "folder", "shards"]
Resolution = Literal[512, 1024, 2048, 4096]


class DataSettings(BaseModel):
    """Where the data is and how it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path  # a folder of pictures with captions, a folder of shards, or one shard
    kind: Kind = "auto"
    resolution: Resolution = 1024  # px; a bucket's area is about resolution²
    caption_temperature: float = Field(1.0, ge=0, allow_inf_nan=False)  # in units of the scores; 0: always the best caption
    max_broken_share: float = Field(0.01, ge=0, le=1)  # of all samples; more of them broken stops the run
    max_pixels: int = Field(8192 * 8192, ge=1024, le=MAX_PIXELS)  # of a picture as stored; more is refused before it is decoded
    max_sequence_length: int | None = Field(None, ge=8, le=1024)  # text positions in training; null: the checkpoint's
    shard_size: int = Field(128, ge=1, le=65_536)  # samples in a shard of the cache
    seed: int = Field(0, ge=0, lt=2**63)  # of the choice of captions and of the order
    cache: Path | None = None  # the folder that `sana data prepare` named

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """The settings. Raises DataError, one line a wrong value, instead of pydantic's ValidationError."""
        try:
            return cls(**values)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, problem['loc'])) or 'data'}: got {problem['input']!r}; {problem['msg']}."
                for problem in error.errors(include_url=False)
            ]
            raise DataError("\n".join(lines)) from None
