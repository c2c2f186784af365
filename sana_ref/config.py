"""Reading a published `config.json` into a frozen dataclass.

A config that is silently half understood gives a model that runs and draws noise, so a key that no field stands for is refused
with the nearest name that does. Keys with a leading underscore (`_class_name`, `_diffusers_version`) describe the file alone.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from engines.errors import SpecError

__all__ = ["config_from_json", "refuse_unless"]

Config = TypeVar("Config")


def config_from_json(cls: type[Config], values: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> Config:
    """Build the dataclass `cls` from a parsed config.json.

    Lists become tuples, all the way down, so that the result is hashable. Keys in `ignore` or with a leading `_` are skipped.
    Raises SpecError for any other key that `cls` has no field for, and whatever the checks of `cls` raise.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    skipped = set(ignore)
    given = {key: _frozen(value) for key, value in values.items() if not key.startswith("_") and key not in skipped}
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(
                f"{cls.__name__}: got the unknown key {key!r}{hint} Expected only: {', '.join(sorted(fields))}. "
                "Remove the key if the model does not depend on it; otherwise this model is not one that is supported."
            )
    return cls(**given)


def refuse_unless(condition: bool, message: str) -> None:
    """Raise SpecError(message) unless `condition` holds."""
    if not condition:
        raise SpecError(message)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
