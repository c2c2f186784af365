"""Folders that appear whole or not at all: temporary folders that do not outlive their writer for long, and the swap.

POSIX cannot rename a folder over one with files in it, so replacing takes more than a rename. docs/bundle.md says what each kill
leaves behind. Everything here stays on one file system, and works on Linux and other POSIX systems.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.errors import BundleError

__all__ = ["TemporaryFolder", "fsync_tree", "locked", "make_temporary", "recover", "remove_dead", "replace_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # what file systems and kernels without it answer


@dataclass(frozen=True)
class TemporaryFolder:
    """A folder with a lock that the kernel drops when its process ends, in whatever way."""

    path: Path
    lock: int  # file descriptor

    def remove(self) -> None:
        """Delete what is at `path` now, and unlock."""
        shutil.rmtree(self.path, ignore_errors=True)  # what remains is dead, so that the next writer deletes it
        os.close(self.lock)


def make_temporary(parent: Path, prefix: str) -> TemporaryFolder:
    """A new, locked folder `parent`/`prefix`xxxxxxxx. Its mode follows the umask, as it may become permanent."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(4)}"
        os.mkdir(path)
        lock = _try_lock(path)
        if lock is not None:
            return TemporaryFolder(path, lock)
        # remove_dead of another process came between the two lines, and the folder is gone


def remove_dead(parent: Path, prefix: str) -> list[Path]:
    """Delete the folders of make_temporary(parent, prefix) whose processes are no more. Returns them."""
    name = re.compile(re.escape(prefix) + "[0-9a-f]{8}")
    removed = []
    for entry in list(os.scandir(parent)):
        path = parent / entry.name
        if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and (lock := _try_lock(path)) is not None:
            TemporaryFolder(path, lock).remove()
            removed.append(path)
    return removed


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock on the folder at `path`; None if somebody else holds it, or the folder went away."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.lstat(path)):  # else what was locked is no longer what is there
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(lock)
        raise BundleError(f"{path}: this file system has no locks ({error.strerror}). Choose a folder on a local disk.") from error
    os.close(lock)
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for, then hold, the lock on `folder`. For a few system calls at a time."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def replace_folder(new: Path, out: Path) -> None:
    """Put the folder `new` in the place of `out`, its sibling, which may be absent. What was at `out` is at `new` afterwards.

    A kill at any point leaves the old or the new folder at `out`, or the old one where recover() finds it. Raises OSError.
    """
    with locked(out.parent):
        if not os.path.lexists(out):
            os.rename(new, out)
        elif not _exchange(new, out):
            aside = _aside(out)
            if os.path.lexists(aside):  # of a writer that was killed after its second rename: `out` is newer
                os.rename(aside, out.parent / f".{out.name}.new-{secrets.token_hex(4)}")  # a dead writer's name
            os.rename(out, aside)
            os.rename(new, out)
            os.rename(aside, new)
        _fsync(out.parent)


def recover(out: Path) -> bool:
    """Put the old folder back if a writer was killed between the two renames of the fallback. True if it did."""
    aside = _aside(out)
    if os.path.lexists(out) or not aside.is_dir():
        return False
    try:
        with locked(out.parent):  # a living writer between its renames holds this
            if os.path.lexists(out) or not aside.is_dir():
                return False
            os.rename(aside, out)
    except OSError as error:
        raise BundleError(
            f"{out}: a writer was killed and left the bundle in {aside}, which cannot be renamed back ({error.strerror}). "
            f"Run: mv {aside} {out}"
        ) from error
    return True


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(Path(root, name))
        _fsync(Path(root))


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step. False where the kernel or the file system cannot. Raises OSError for anything else."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux 3.15, glibc 2.28
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
