"""Where each value of a composed configuration was written: a line of a YAML file, or the command line.

Hydra merges files and forgets which said what. It does say which files it merges, and in which order: reading those again, with
line numbers, and letting the last one win gives every value its origin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["COMMAND_LINE", "Origin", "Origins", "leaves", "read_origins"]

COMMAND_LINE = "command line"
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """file: None for the command line. expression: what was written there, where that is an interpolation."""

    file: Path | None
    line: int = 0
    expression: str | None = None

    def __str__(self) -> str:
        if self.file is None:
            return COMMAND_LINE
        return f"{_short(self.file)}:{self.line}"


class Origins:
    """A dotted key's origin. What is said later hides what was said before, also of the keys within it."""

    def __init__(self) -> None:
        self._at: dict[Key, Origin] = {}

    def set(self, key: Key, origin: Origin) -> None:
        for other in [k for k in self._at if k[: len(key)] == key or key[: len(k)] == k]:
            del self._at[other]
        self._at[key] = origin

    def remove(self, key: Key) -> None:
        for other in [k for k in self._at if k[: len(key)] == key]:
            del self._at[other]

    def of(self, key: Sequence[str]) -> Origin | None:
        """That of the key itself, of what it is part of (an element of a list), or of the first key within it."""
        whole = tuple(key)
        for length in range(len(whole), 0, -1):
            if whole[:length] in self._at:
                return self._at[whole[:length]]
        return next((origin for k, origin in self._at.items() if k[: len(whole)] == whole), None)

    def names_in(self, key: Key) -> list[str]:
        """The keys right below `key`, each once."""
        return list(dict.fromkeys(k[len(key)] for k in self._at if len(k) > len(key) and k[: len(key)] == key))

    def __contains__(self, key: Key) -> bool:
        return any(k[: len(key)] == key for k in self._at)


def read_origins(file: Path, package: str, origins: Origins) -> None:
    """Add what `file` says, below `package` (dotted; empty for the root)."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode):
        above = tuple(package.split(".")) if package else ()
        for key, line, expression in _scalars(node, ()):
            if key[0] != "defaults":
                origins.set(above + key, Origin(file, line, expression))


def _scalars(node: yaml.MappingNode, above: Key) -> Iterator[tuple[Key, int, str | None]]:
    for name, value in node.value:
        key, line = (*above, str(name.value)), name.start_mark.line + 1
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _scalars(value, key)
        else:
            text = value.value if isinstance(value, yaml.ScalarNode) else ""
            yield key, line, text if "${" in text else None


def leaves(values: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """(key, value) of all that is not a mapping with something in it; lists are values."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value


def _short(file: Path) -> str:
    try:
        return file.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(file)
