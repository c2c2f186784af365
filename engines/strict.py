"""Read JSON that may be hostile: bounded, unambiguous, and checked against a schema whose complaints a person can act on.

What Python's json lets pass and this refuses: NaN and Infinity, a key written twice (readers differ in which one wins), bytes that
are not UTF-8, nesting that exhausts the stack. What pydantic says of an unknown key, this says with the nearest key that exists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from engines.errors import ManifestError, MissingFileError
from engines.spec import nearest

__all__ = ["MAX_JSON_BYTES", "fields_at", "loads", "read_bounded", "validate_json"]

MAX_JSON_BYTES = 16 << 20
_MAX_COMPLAINTS = 5  # of one document: the rest usually follows from the first

Model = TypeVar("Model", bound=BaseModel)


def read_bounded(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a small file. Raises MissingFileError, or ManifestError for a special file and for more than `limit` bytes."""
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
            raise ManifestError(f"{path}: got a folder or a special file; expected a regular file. Copy the bundle again.")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file. Is this the folder of a bundle, and was all of it copied?") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) > limit:
        raise ManifestError(f"{path}: got more than {limit} bytes; expected at most that. This is not a file of ours.")
    return data


def loads(data: bytes, *, source: str) -> Any:
    """Parse strict JSON. `source` names the document in messages. Raises ManifestError."""
    if len(data) > MAX_JSON_BYTES:
        raise ManifestError(f"{source}: got {len(data)} bytes; expected at most {MAX_JSON_BYTES}.")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        cut = not error.doc.rstrip().endswith("}")  # our documents are objects
        hint = "the file ends too early: copy it again, or rebuild." if cut else "rebuild, or copy the file again."
        raise ManifestError(f"{source}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); {hint}") from None
    except RecursionError:
        raise ManifestError(f"{source}: nested too deeply. This is not a file of ours.") from None
    except ValueError as error:  # not UTF-8, a constant, a key twice, an integer of thousands of digits
        raise ManifestError(f"{source}: not strict JSON ({error}).") from None


def validate_json(model: type[Model], data: bytes, *, source: str) -> Model:
    """Parse `data` as strict JSON and check it against `model`. Raises ManifestError naming every field that is wrong."""
    loads(data, source=source)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        complaints = [_complaint(model, e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors(include_url=False)]
        more = len(complaints) - _MAX_COMPLAINTS
        rest = f"\n  and {more} more" if more > 0 else ""
        raise ManifestError(f"{source}: does not fit the schema:\n  " + "\n  ".join(complaints[:_MAX_COMPLAINTS]) + rest) from None


def _complaint(model: type[BaseModel], loc: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    where = ".".join(str(part) for part in loc if part != "[key]") or "the document"
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {nearest(str(loc[-1]), fields_at(model, loc[:-1]))}."
    if kind == "missing":
        return f"{where}: missing. Rebuild with a program that writes it."
    if kind == "value_error":
        return f"{where}: {message.removeprefix('Value error, ')}."
    shown = repr(value)
    return f"{where}: got {shown if len(shown) <= 80 else shown[:77] + '...'}; {message[0].lower()}{message[1:]}."


def fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid at `loc` of a document of `model`: walks models, and containers and unions of them."""
    at: Any = model
    for part in loc:
        inner = _models(at)
        tagged = [model for model in inner if any(field.default == part for field in model.model_fields.values())]
        if inner and str(part) in inner[0].model_fields:
            at = inner[0].model_fields[str(part)].annotation
        elif len(inner) > 1 and tagged:  # one member of a union, named by its discriminator
            at = tagged[0]
        # else: `part` is a key or an index of a container, whose annotation already names what it contains
    inner = _models(at)
    return list(inner[0].model_fields) if inner else []


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for arg in get_args(annotation) for found in _models(arg)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"got {name}; expected finite numbers")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found
