"""Say what a full disk means: how much was needed, how much there was, and where."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

from engines.errors import DiskFullError

__all__ = ["DiskErrors", "folder_bytes", "human_bytes"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskErrors:
    """`with DiskErrors(folder, needed=…, remedy=…):` turns running out of room inside it into DiskFullError.

    folder: what is being written, which is on the disk that the message speaks of.
    needed: bytes, where they are known. Entering raises at once if there is less room than that.
    """

    def __init__(self, folder: Path, *, remedy: str, needed: int | None = None) -> None:
        self.folder, self.remedy, self.needed = folder, remedy, needed

    def __enter__(self) -> None:
        if self.needed is not None and shutil.disk_usage(self.folder).free < self.needed:
            raise self._error()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Libraries in C++ and Rust raise errors of their own for a full disk; all of them pass on the system's words.
        is_full = (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error)
        if error is not None and is_full and not isinstance(error, DiskFullError):
            raise self._error() from error

    def _error(self) -> DiskFullError:
        free, written = shutil.disk_usage(self.folder).free, folder_bytes(self.folder)
        needed = f"expected room for {human_bytes(self.needed)}" if self.needed is not None else "expected more"
        return DiskFullError(
            f"disk full: got {human_bytes(free)} free at {self.folder}, beside the {human_bytes(written)} written there so far; "
            f"{needed}. {self.remedy}"
        )


def folder_bytes(folder: Path) -> int:
    """The sizes of all regular files below `folder`, summed. Files that vanish meanwhile count as nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def human_bytes(num_bytes: int) -> str:
    """As people write sizes of disks: powers of 1000."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
