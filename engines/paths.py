"""Paths that come from a file: which are allowed, and where they may lead."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from engines.errors import MissingFileError, UnsafePathError

__all__ = ["MAX_PATH_LENGTH", "check_relative", "inside"]

MAX_PATH_LENGTH = 240  # characters; leaves room for the folder below Windows' 260
# A list of what is allowed leaves nothing to forget: no drive letters, streams, control characters, Unicode look-alikes or spaces.
# A part never starts with a dot, so there is no `.`, no `..`, no hidden file.
_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*", re.ASCII)


def check_relative(path: str, *, source: str) -> str:
    """Returns `path` if it is a plain relative POSIX path. Raises UnsafePathError, which names `source`, the document it is in."""
    if not 0 < len(path) <= MAX_PATH_LENGTH:
        raise UnsafePathError(f"{source}: got a path of {len(path)} characters; expected 1 to {MAX_PATH_LENGTH}.")
    parts = path.split("/")
    if ".." in parts or path[0] == "/" or "\\" in path or path[1:2] == ":":
        raise UnsafePathError(
            f"{source}: got the path {path!r}, which leads out of the bundle; expected a relative path inside it, with '/' between "
            "names. Do not use this bundle unless you know who made it."
        )
    for part in parts:
        if not _PART.fullmatch(part):
            raise UnsafePathError(
                f"{source}: got the path {path!r}; expected names of letters, digits and '._+-' that do not start with a dot, "
                "joined by single '/'."
            )
    return path


def inside(root: Path, path: str, *, source: str) -> Path:
    """The regular file that `path` names below `root`, following links only as long as they stay below `root`.

    Raises UnsafePathError if it leads out or is not a regular file (a FIFO would block its reader for ever), MissingFileError if
    there is nothing. A folder that someone changes while it is read is not defended against.
    """
    check_relative(path, source=source)
    real_root = root.resolve()
    try:
        real = (real_root / path).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        real = (real_root / path).resolve(strict=False)
        if not real.is_relative_to(real_root):
            raise UnsafePathError(_leads_out(source, path, real)) from None
        raise MissingFileError(
            f"{source} names {path!r}, which is not in {root}. Copy the whole folder again, or rebuild."
        ) from None
    except (RuntimeError, OSError) as error:  # a loop of links
        raise UnsafePathError(f"{source}: {path!r} cannot be followed ({error}).") from None
    if not real.is_relative_to(real_root):
        raise UnsafePathError(_leads_out(source, path, real))
    if not stat.S_ISREG(real.stat().st_mode):
        raise UnsafePathError(f"{source}: {path!r} is not a regular file. Copy the whole folder again, or rebuild.")
    return real


def _leads_out(source: str, path: str, real: Path) -> str:
    return (
        f"{source}: {path!r} is a link that leads out of the bundle, to {real}; expected a file inside it. "
        "Copy the bundle with its links followed (cp -rL), if you trust where they lead."
    )
