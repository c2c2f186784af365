"""What a deployer sets once, instead of in each call: the schema of configs/runtime.yaml, and the built-in defaults.

    settings = load("runtime")     # or RuntimeSettings(): the same, without reading a file
    engine = SanaEngine(bundle, backend=settings.backend, verify=settings.verify, num_threads=settings.num_threads)

Files are read only where a configuration is asked for by name; nothing else of the runtime reads this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.config import compose, validate
from runtime.request import MAX_GUIDANCE
from runtime.schedule import MAX_STEPS, SchedulerName
from runtime.session import BackendName

__all__ = ["RuntimeSettings", "load"]

Count = Annotated[int, Field(ge=1)]


class RuntimeSettings(BaseModel):
    """None: as the bundle says. A test holds these defaults equal to configs/runtime.yaml, which says what each means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["auto", BackendName] = "auto"
    verify: bool = True
    num_threads: Count | None = None
    batch: Count | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None
    width: Count | None = None  # what a side may be depends on the bundle
    height: Count | None = None
    scheduler: SchedulerName | None = None
    schedule_file: Path | None = None  # not `schedule`, which would be a group of files
    negative: str = ""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.scheduler is not None and self.schedule_file is not None:
            raise ValueError("got both of scheduler and schedule_file; expected at most one of them. Set the other to null")
        return self


def load(config: str = "runtime", overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> RuntimeSettings:
    """configs/CONFIG.yaml with `overrides` (key=value) over it. Raises ConfigError."""
    return validate(compose(config, overrides, config_dir), RuntimeSettings)
