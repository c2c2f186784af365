"""Results of build stages, kept by what went into them: a second run with nothing changed does no work.

    folder = store.get_or_make(digest_of({"stage": "export", ...}), lambda folder: export(folder / "model.onnx"))

An entry is `<root>/<first two letters of the key>/<key>/`: index.json (sizes and SHA-256) beside `files/`, the folder that is
returned. It appears by one rename, whole. It is compared with its index whenever it is used, so nothing needs to be flushed to the
disk when it is made: what a power cut damages is made again.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from engines.atomic import TemporaryFolder, locked, make_temporary, remove_dead
from engines.digest import Progress, digest_of, file_sha256
from engines.disk import DiskErrors
from engines.errors import BundleError, DigestError
from engines.strict import read_bounded, validate_json

__all__ = ["Store", "default_root", "digest_of", "file_sha256"]

_log = logging.getLogger(__name__)
_KEY = re.compile(r"[A-Za-z0-9_-]{2,128}", re.ASCII)
_PREFIX = "new-"  # of temporary folders, under <root>/tmp
_INDEX = "index.json"
_REMEDY = "Free some space, or set SANA_CACHE_DIR to a folder on another disk."


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    size: int
    sha256: str


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    schema_version: Literal[1] = 1
    key: str
    files: dict[str, _File]


def default_root() -> Path:
    """$SANA_CACHE_DIR, or ~/.cache/sana."""
    return Path(os.environ.get("SANA_CACHE_DIR") or Path.home() / ".cache" / "sana")


class Store:
    """A folder of finished results. Any number of processes may use one at once."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root is not None else default_root()

    def get_or_make(
        self, key: str, make: Callable[[Path], None], *, needed: int | None = None, progress: Progress | None = None
    ) -> Path:
        """The folder of results for `key`, made by `make(folder)` unless it is there and intact. Do not write into it.

        key: 2 to 128 letters, digits, - and _; usually digest_of everything that decides the result.
        make: fills the empty folder it is given with regular files. What it raises passes through, and leaves nothing behind.
        needed: bytes that it will write, where known: then a disk that is too full is refused before the work.
        progress: called with numbers of bytes as they are digested.
        Two processes with one key both make it; who finishes last discards its own and gets the other's.
        Raises DiskFullError, also for a full disk inside `make`.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"key: got {key[:140]!r}; expected 2 to 128 letters, digits, - and _")
        entry = self.root / key[:2] / key
        if self._is_intact(entry, key, progress):
            return entry / "files"
        entry.parent.mkdir(parents=True, exist_ok=True)
        building = self.root / "tmp"
        building.mkdir(exist_ok=True)
        remove_dead(building, _PREFIX)
        temporary = make_temporary(building, _PREFIX)
        try:
            with DiskErrors(temporary.path, needed=needed, remedy=_REMEDY):
                self._fill(temporary, key, make, progress)
            return self._publish(temporary, entry, key, progress)
        finally:
            temporary.remove()

    def _fill(self, temporary: TemporaryFolder, key: str, make: Callable[[Path], None], progress: Progress | None) -> None:
        folder = temporary.path / "files"
        folder.mkdir()
        make(folder)
        files = {
            name: _File(size=(folder / name).stat().st_size, sha256=file_sha256(folder / name, progress=progress))
            for name in _regular_files(folder)
        }
        (temporary.path / _INDEX).write_text(_Index(key=key, files=files).model_dump_json(indent=1), encoding="utf-8")

    def _publish(self, temporary: TemporaryFolder, entry: Path, key: str, progress: Progress | None) -> Path:
        while True:
            try:
                os.rename(temporary.path, entry)
                return entry / "files"
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self._is_intact(entry, key, progress):  # another process was faster
                return entry / "files"

    def _is_intact(self, entry: Path, key: str, progress: Progress | None) -> bool:
        """False if there is no entry, or there was a damaged one, which is gone then."""
        try:
            seen = os.stat(entry)
        except FileNotFoundError:
            return False
        try:
            _compare(entry, key, progress)
        except (BundleError, OSError) as error:
            with locked(self.root):
                # Another process may have replaced the damaged entry since it was looked at: that one is not touched.
                if entry.exists() and os.path.samestat(seen, os.stat(entry)):
                    _log.warning("cache: %s is damaged and is made again: %s", entry, error)
                    building = self.root / "tmp"
                    building.mkdir(exist_ok=True)
                    trash = make_temporary(building, _PREFIX)
                    os.rename(entry, trash.path / "files")
                    trash.remove()
                    return False
            return self._is_intact(entry, key, progress)
        return True


def _compare(entry: Path, key: str, progress: Progress | None) -> None:
    """Raises BundleError or OSError if the entry is not what its index says."""
    index = validate_json(_Index, read_bounded(entry / _INDEX), source=str(entry / _INDEX))
    folder = entry / "files"
    found = _regular_files(folder)
    if index.key != key or set(found) != set(index.files):
        raise DigestError(f"got {len(found)} files; expected the {len(index.files)} of its index")
    for name, expected in index.files.items():
        size = (folder / name).stat().st_size
        if size != expected.size:
            raise DigestError(f"{name}: got {size} bytes; expected {expected.size}")
        if (got := file_sha256(folder / name, progress=progress)) != expected.sha256:
            raise DigestError(f"{name}: got SHA-256 {got}; expected {expected.sha256}")


def _regular_files(folder: Path) -> list[str]:
    """POSIX paths below `folder`. Raises BundleError for a link or a special file: its content could change unseen."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError(f"{path}: got a link or a special file; expected regular files only")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return names
