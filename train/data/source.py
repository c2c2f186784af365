"""What a data set holds: a folder of pictures with captions beside them, or WebDataset shards.

A sample is a picture and a JSON file of the same name: `a/b.jpg` and `a/b.json`, in a folder at any depth, or as members of a tar
that follow each other. The JSON is an object with "captions", a list of strings or of {"text": ..., "score": ...}, or with one
"prompt" or "caption"; other keys are left alone. Files whose names begin with a dot, and of other kinds, are left alone too.

`find` looks at names and sizes alone: of a tar it reads headers and skips what is between, so that every sample can be read by
itself later, in any order and by any process. webdataset's own pipeline reads a tar from end to end and decompresses without a
limit; the rule that groups members into samples is the package's.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.captions import Caption
from train.data.errors import BrokenSample, DataError
from train.data.images import MAX_IMAGE_BYTES, SUFFIXES
from train.data.report import Broken
from train.data.settings import DataSettings

__all__ = ["Found", "Item", "Part", "find", "parse_captions", "read_captions", "read_image"]

MAX_JSON_BYTES = 2**20
MAX_CAPTIONS = 64
MAX_CAPTION_CHARACTERS = 100_000
BLOCK = 512  # bytes; a tar ends with blocks of zeros
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file; path relative to the data set."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Item:
    """A sample that is there by its names. key: unique within the data set."""

    key: str
    image: Part
    captions: Part


@dataclass(frozen=True, slots=True)
class Found:
    """items: by name, always in the same order. digest: of the files' names, sizes and times of change."""

    root: Path
    items: tuple[Item, ...]
    broken: tuple[Broken, ...]
    digest: str

    @property
    def total(self) -> int:
        return len(self.items) + len(self.broken)


def find(settings: DataSettings) -> Found:
    """Raises DataError if there is nothing, or not what the settings say."""
    path = settings.path
    if path.is_file():
        root, names = path.parent, [path.name]
    elif path.is_dir():
        root, names = path, sorted(_files(path))
    else:
        raise DataError(f"{path}: no such file or folder; expected a data set.")
    shards = [name for name in names if name.endswith(".tar")]
    images = [name for name in names if _suffix(name) in SUFFIXES]
    kind = settings.kind
    if kind == "auto":
        if shards and images:
            raise DataError(
                f"{path}: got {len(shards)} shards and {len(images)} pictures beside them; expected one or the other. "
                "Set kind to 'shards' or 'folder'."
            )
        kind = "shards" if shards else "folder"
    items: list[Item] = []
    broken: list[Broken] = []
    used = shards if kind == "shards" else [name for name in names if _suffix(name) in SUFFIXES | {"json"}]
    statuses = {name: os.stat(root / name) for name in used}
    if kind == "shards":
        for name in shards:
            _find_in_shard(root, name, items, broken)
    else:
        _find_in_folder({name: status.st_size for name, status in statuses.items()}, items, broken)
    if not items and not broken:
        looked_for = ".tar shards" if kind == "shards" else f"pictures ({', '.join(sorted(SUFFIXES))}) with .json files beside them"
        raise DataError(f"{path}: the data set is empty: got {len(names)} files and no samples; expected {looked_for}.")
    listing = [[name, status.st_size, status.st_mtime_ns] for name, status in statuses.items()]
    digest = hashlib.sha256(json.dumps([kind, listing]).encode()).hexdigest()
    return Found(root=root, items=tuple(items), broken=tuple(broken), digest=digest)


def read_image(root: Path, item: Item) -> bytes:
    """The picture's file. Raises BrokenSample."""
    return _read(root, item.image, MAX_IMAGE_BYTES, "picture")


def read_captions(root: Path, item: Item) -> tuple[Caption, ...]:
    """Raises BrokenSample."""
    return parse_captions(_read(root, item.captions, MAX_JSON_BYTES, "caption file"))


def parse_captions(content: bytes) -> tuple[Caption, ...]:
    """One caption or more, from JSON. Raises BrokenSample."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"the caption file is not JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise BrokenSample(f"the caption file holds a {type(value).__name__}; expected an object with 'captions' or 'prompt'")
    found = value.get("captions", value.get("prompt", value.get("caption")))
    entries = [found] if isinstance(found, str) else found
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_CAPTIONS:
        got = f"{len(entries)} captions" if isinstance(entries, list) else f"captions of type {type(entries).__name__}"
        raise BrokenSample(f"got {got}; expected a list of 1 to {MAX_CAPTIONS}, or one string")
    captions = [_caption(entry) for entry in entries]
    scored = [caption for caption, has_score in captions if has_score]
    if scored and len(scored) < len(captions):
        raise BrokenSample(f"got scores for {len(scored)} of {len(captions)} captions; expected all or none to have one")
    return tuple(caption for caption, _ in captions)


def _caption(entry: Any) -> tuple[Caption, bool]:
    text, score = (entry.get("text"), entry.get("score")) if isinstance(entry, dict) else (entry, None)
    if not isinstance(text, str) or not text.strip():
        raise BrokenSample(f"got the caption {text!r:.100}; expected text")
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise BrokenSample(f"got a caption of {len(text)} characters; expected at most {MAX_CAPTION_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenSample("got a caption with half a surrogate pair; expected text") from None
    if score is None:
        return Caption(text), False
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1e9 <= score <= 1e9:  # NaN compares false
        raise BrokenSample(f"got the score {score!r:.100}; expected a number")
    return Caption(text, float(score)), True


def _read(root: Path, part: Part, most: int, what: str) -> bytes:
    if part.size > most:
        raise BrokenSample(f"got a {what} of {part.size} bytes; expected at most {most}")
    try:
        with open(root / part.path, "rb") as stream:
            stream.seek(part.offset)
            content = stream.read(part.size)
    except OSError as error:
        raise BrokenSample(f"the {what} cannot be read ({error.strerror})") from None
    if len(content) != part.size:
        raise BrokenSample(f"got {len(content)} bytes of the {what}; expected {part.size}: the file changed meanwhile")
    return content


def _files(folder: Path) -> Iterator[str]:
    """Regular files below a folder, relative; none that is hidden."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.exists() and stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
                yield path.relative_to(folder).as_posix()


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _find_in_folder(sizes: dict[str, int], items: list[Item], broken: list[Broken]) -> None:
    groups: dict[str, dict[str, Part]] = {}
    for name, size in sizes.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = Part(name, 0, size)
    for key, parts in groups.items():
        _add(key, [(_suffix(name), part) for name, part in parts.items()], items, broken)


def _find_in_shard(root: Path, name: str, items: list[Item], broken: list[Broken]) -> None:
    from webdataset.tariterators import group_by_keys  # type: ignore[import-untyped]  # loads PyTorch

    def report(error: Exception) -> bool:
        broken.append(Broken(name, str(error.args[0]) if error.args else type(error).__name__))
        return True  # go on

    seen: set[str] = set()
    for group in group_by_keys(_members(root, name, broken), handler=report):
        key = f"{name}/{group['__key__']}"
        if key in seen:
            broken.append(Broken(key, "a sample of the same name is in this shard already"))
            continue
        seen.add(key)
        _add(key, [(suffix, part) for suffix, part in group.items() if not suffix.startswith("__")], items, broken)


def _add(key: str, parts: list[tuple[str, Part]], items: list[Item], broken: list[Broken]) -> None:
    images = [part for suffix, part in parts if suffix in SUFFIXES]
    captions = [part for suffix, part in parts if suffix == "json"]
    if len(images) == 1 and len(captions) == 1:
        items.append(Item(key, images[0], captions[0]))
    else:
        broken.append(Broken(key, f"got {len(images)} pictures and {len(captions)} JSON files; expected one of each"))


def _members(root: Path, name: str, broken: list[Broken]) -> Iterator[dict[str, Any]]:
    """The files of a tar that are whole, as group_by_keys takes them. Python's tarfile ends quietly at a cut; this does not."""
    path = root / name
    size = path.stat().st_size
    with open(path, "rb") as stream:
        begin = stream.read(8)
        for magic, method in COMPRESSED.items():
            if begin.startswith(magic):
                broken.append(Broken(name, f"compressed with {method}; expected a plain tar: pictures are compressed already"))
                return
        stream.seek(0)
        offset = 0
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                    offset = member.offset
                    if member.size < 0:  # its end would lie before it, and so would the next member
                        raise tarfile.ReadError("negative size")
                    end = member.offset_data + member.size
                    if member.isreg() and member.issparse():
                        broken.append(Broken(f"{name}/{member.name}", "a sparse file; expected a plain one"))
                    elif member.isreg() and end <= size and not member.name.startswith("__"):  # webdataset's own names
                        yield {"fname": member.name, "data": Part(name, member.offset_data, member.size), "__url__": name}
                offset = tar.offset
            stream.seek(offset)
            whole = stream.read(BLOCK) == bytes(BLOCK)
        except tarfile.TarError:
            whole = False
        if not whole:
            broken.append(Broken(name, f"the shard is cut or damaged after {offset} of {size} bytes; what came before is used"))
