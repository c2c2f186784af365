"""Kernels that TensorRT for RTX compiled, kept in files: what one process compiles, the next one loads.

TensorRT for RTX compiles an engine's kernels on the machine that runs it, when a context is made and when a shape is first seen. It
collects them in an `IRuntimeCache`; here each engine's goes to a file of its own, one for each GPU, driver and TensorRT. The full
TensorRT compiles when an engine is built, and has no such thing.

A file is 32 bytes of SHA-256 and then what TensorRT wrote. The digest is of the key and of those bytes: a file that is damaged, cut
off, or another engine's under this name is as if it were not there, and TensorRT never sees it. A cache changes how long a picture
takes, never what it shows, so nothing here raises for what is on the disk: it is said once, and kernels are compiled again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.digest import digest_of
from engines.errors import BundleError, MissingFileError
from engines.strict import read_bounded

__all__ = ["MAX_FILE_BYTES", "MAX_TOTAL_BYTES", "KernelCache", "Kernels", "kernel_folder"]

MAX_FILE_BYTES = 1 << 30  # what is read into memory, at most
MAX_TOTAL_BYTES = 4 << 30  # of all files; those that were used longest ago go first

_log = logging.getLogger("runtime")
_DIGEST_BYTES = 32
_PREFIX = "new-"  # of temporary folders
_SUFFIX = ".kernels"


def kernel_folder(wanted: Path | str | bool) -> Path | None:
    """Where kernels are kept. True: in the folder of all caches, $SANA_CACHE_DIR or ~/.cache/sana. False: nowhere."""
    if isinstance(wanted, bool):
        from engines.store import default_root  # only here: it needs POSIX

        return default_root() / "kernels" if wanted else None
    return Path(wanted)


class KernelCache:
    """A folder of compiled kernels. Any number of processes may use one; of two that write one file, the last one's stays."""

    def __init__(
        self, folder: Path, *, machine: Mapping[str, str], max_file: int = MAX_FILE_BYTES, max_total: int = MAX_TOTAL_BYTES
    ) -> None:
        """machine: what kernels depend on besides their engine: GPU, driver, TensorRT. Touches nothing yet."""
        self.folder, self._machine = folder, dict(machine)
        self._max_file, self._max_total = max_file, max_total
        self._unwritable = False  # it was said

    def kernels(self, engine_sha256: str) -> Kernels:
        """Those of one engine's file."""
        return Kernels(self, digest_of({"engine": engine_sha256, "machine": self._machine}))

    def path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def read(self, key: str) -> bytes | None:
        """What was written under `key`, to the bit, or None."""
        path = self.path(key)
        try:
            data = read_bounded(path, limit=self._max_file)
        except MissingFileError:
            return None
        except BundleError as error:
            _log.warning("kernel cache: a file is ignored, and its kernels are compiled again: %s", error)
            return None
        content = data[_DIGEST_BYTES:]
        if data[:_DIGEST_BYTES] != _digest(key, content):
            _log.warning("kernel cache: %s is damaged or another engine's; it is ignored, and its kernels are compiled again", path)
            return None
        try:
            os.utime(path)  # it was used just now
        except OSError:
            pass  # a read-only folder: nothing is removed there either
        return content

    def write(self, key: str, content: bytes | memoryview) -> None:
        """Under `key`, whole or not at all. Files that were used longest ago may go for it."""
        from engines.atomic import make_temporary, remove_dead  # only here: it needs POSIX

        path, size = self.path(key), _DIGEST_BYTES + len(content)
        if size > min(self._max_file, self._max_total):
            _log.warning("kernel cache: got %d bytes for %s; expected at most %d. They are not kept", size, path, self._max_file)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_dead(self.folder, _PREFIX)
            temporary = make_temporary(self.folder, _PREFIX)
            try:
                new = temporary.path / path.name
                with open(new, "xb") as file:
                    file.write(_digest(key, content))
                    file.write(content)
                os.replace(new, path)
            finally:
                temporary.remove()
            self._remove_oldest(kept=path)
        except (OSError, BundleError) as error:  # a BundleError: the file system has no locks
            if not self._unwritable:
                _log.warning("kernel cache: %s cannot be written, so the next start compiles kernels again: %s", self.folder, error)
            self._unwritable = True

    def _remove_oldest(self, *, kept: Path) -> None:
        found = []
        for each in self.folder.glob(f"*{_SUFFIX}"):
            try:
                seen = each.lstat()
            except FileNotFoundError:  # another process was quicker
                continue
            found.append((each != kept, -seen.st_mtime_ns, seen.st_size, each))
        total = 0
        for _, _, size, each in sorted(found):
            total += size
            if total > self._max_total:
                each.unlink(missing_ok=True)


class Kernels:
    """The compiled kernels of one engine in this process, and the file that they come from and go to."""

    def __init__(self, cache: KernelCache, key: str) -> None:
        self._cache, self._key = cache, key
        self._config: Any = None  # lives as long as what it made
        self._kernels: Any = None  # IRuntimeCache
        self._stored = 0  # bytes of what the file has, or was given in vain

    def attach(self, config: Any) -> None:
        """Contexts made with this IRuntimeConfig take their kernels from the file, as far as it has them, and leave theirs here.

        CUDA's context must be current. Does nothing for a TensorRT without such a cache.
        """
        if not hasattr(config, "create_runtime_cache"):
            return
        self._config, self._kernels, self._stored = config, config.create_runtime_cache(), 0
        if self._kernels is None:
            return
        content = self._cache.read(self._key)
        if content is not None:
            if self._kernels.deserialize(content):
                self._stored = len(content)
            else:
                _log.warning("kernel cache: TensorRT does not take %s; its kernels are compiled again", self._cache.path(self._key))
        if config.set_runtime_cache(self._kernels) is False:
            _log.warning("kernel cache: TensorRT does not use one, so every start compiles kernels")
            self._kernels = None

    def save(self) -> None:
        """Write the file, if it lacks something. Not while a CUDA graph is captured.

        The same kernels are written in other bytes each time (TensorRT for RTX 1.6.1), but no more of them.
        """
        content = None if self._kernels is None else self._kernels.serialize()
        if content is None:
            return
        view = memoryview(content).cast("B")
        if len(view) > self._stored:
            self._stored = len(view)
            self._cache.write(self._key, view)

    def close(self) -> None:
        """After the contexts that were made with it."""
        self._kernels = None
        self._config = None


def _digest(key: str, content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(content)
    return digest.digest()
