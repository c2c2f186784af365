"""Schedules as YAML files. Apart from runtime.schedule, so that those who need tables alone need neither PyYAML nor pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.errors import RequestError, SpecError
from engines.spec import nearest
from runtime.config import compose, validate
from runtime.schedule import INTERMEDIATE_TIMESTEP, MAX_STEPS, Schedule, SchedulerName, SpacingName, make_schedule

__all__ = ["ScheduleFile", "read_schedule_file"]

MAX_BYTES = 64 << 10
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ScheduleFile(BaseModel):
    """The keys of a schedule's YAML file; make_schedule says what each means."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scheduler: SchedulerName
    num_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)  # left out where spacing is a list
    flow_shift: Positive | None = None  # flow samplers; 3.0 unless given
    spacing: SpacingName | Annotated[list[Positive], Field(min_length=1, max_length=MAX_STEPS)] = "linear"
    max_timestep: Positive | None = None  # scm, radians
    intermediate_timestep: Positive | Literal["even"] | None = None  # scm, radians; "even": no special middle


class _Group(BaseModel):
    schedule: ScheduleFile


def read_schedule_file(path: Path, *, num_steps: int | None = None) -> Schedule:
    """Read, check and compute. Raises SpecError naming the file, the key, and for an unknown key the nearest valid one.

    path: a file of one's own, which is read alone and within limits; or a name of the group "schedule" of the configuration.
    """
    is_name = not path.suffix and len(path.parts) == 1 and not path.exists()
    spec = validate(compose(f"schedule/{path}"), _Group).schedule if is_name else _parse(path)
    flow_only, scm_only = (
        {"flow_shift": spec.flow_shift},
        {
            "max_timestep": spec.max_timestep,
            "intermediate_timestep": spec.intermediate_timestep,
        },
    )
    for name, value in (flow_only if spec.scheduler == "scm" else scm_only).items():
        if value is not None:
            raise SpecError(f"{path}: {name} has no meaning for {spec.scheduler!r}. Leave it out.")
    middle = spec.intermediate_timestep
    try:
        return make_schedule(
            spec.scheduler,
            spec.num_steps if num_steps is None else num_steps,
            3.0 if spec.flow_shift is None else spec.flow_shift,
            spec.spacing,
            max_timestep=spec.max_timestep,
            intermediate_timestep=INTERMEDIATE_TIMESTEP if middle is None else None if middle == "even" else middle,
        )
    except (SpecError, RequestError) as error:
        if isinstance(error, RequestError) and num_steps is not None:
            raise  # the number came from the caller
        raise SpecError(f"{path}: {error}") from None


def _parse(path: Path) -> ScheduleFile:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise SpecError(f"{path}: more than {MAX_BYTES} characters; a schedule is a few lines.")
        data: Any = yaml.safe_load(text)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); expected a schedule's YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"{path}: not YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: got a {type(data).__name__}; expected keys such as 'scheduler: flow_euler'.")
    try:
        return ScheduleFile.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "the file"
        if first["type"] == "extra_forbidden":
            raise SpecError(f"{path}: unknown key {where!r}; {nearest(where, ScheduleFile.model_fields)}.") from None
        if first["type"] == "missing":
            raise SpecError(f"{path}: {where} is missing.") from None
        raise SpecError(f"{path}: {where}: got {data.get(where)!r}; {first['msg'][0].lower()}{first['msg'][1:]}.") from None
