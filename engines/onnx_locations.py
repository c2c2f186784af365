"""Where an ONNX file says its weights are, without the onnx package.

A tensor's data may lie in another file, named by a string inside the model: `location`. A loader follows it, so a bundle must not
open before each was compared with the manifest. A protobuf message is a row of (field number, wire type, value); those that can
contain a tensor are few, and `_CHILDREN` lists them. Everything else is skipped by its length. Field numbers: onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from engines.errors import BundleError

__all__ = ["MAX_GRAPH_BYTES", "external_locations"]

MAX_GRAPH_BYTES = 512 << 20  # a graph whose weights are elsewhere: 20 MB would be large
_MAX_DEPTH = 64  # graphs in attributes of nodes of graphs

_CHILDREN = {  # message: {field number: message that it holds}
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_locations(path: Path) -> set[str]:
    """Every `location` of external data in an ONNX file. Raises BundleError if it is not one, or is too large to be a graph."""
    size = path.stat().st_size
    if not 0 < size <= MAX_GRAPH_BYTES:
        raise BundleError(f"{path}: got {size} bytes; expected 1 to {MAX_GRAPH_BYTES} for a graph whose weights are beside it.")
    found: set[str] = set()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _walk(data, 0, size, "model", found, _MAX_DEPTH)
        except (IndexError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise BundleError(f"{path}: not an ONNX file ({error}). Copy it again, or rebuild.") from None
    return found


def _walk(data: mmap.mmap, start: int, end: int, message: str, found: set[str], depth: int) -> None:
    if not depth:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    children = _CHILDREN.get(message, {})
    key = value = b""
    for number, first, last in _fields(data, start, end):
        if number in children:
            _walk(data, first, last, children[number], found, depth - 1)
        elif message == "entry":
            key, value = (data[first:last], value) if number == 1 else (key, data[first:last]) if number == 2 else (key, value)
    if key == b"location":
        found.add(value.decode("utf-8"))


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each length-delimited field between `at` and `end`; the others are numbers, and are skipped."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire, number = tag & 7, tag >> 3
        if wire == 2:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise ValueError(f"a field of {length} bytes at {at} where {end - at} are left")
            yield number, at, at + length
            at += length
        elif wire == 0:
            _, at = _varint(data, at, end)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at {at}")
    if at != end:
        raise ValueError(f"a field passes its end at {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"cut off at {at}")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 10 bytes at {at}")
