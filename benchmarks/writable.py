"""Whether a result can be written, asked before it is measured for minutes."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from engines.errors import RequestError

__all__ = ["check_writable", "writable_file"]


def check_writable(option: str, path: Path, *, folder: bool = False) -> None:
    """Raises RequestError where the file `path` cannot be written, or a file in it with `folder`. Nothing is left there.

    Folders that are not there yet may be made, so the nearest that is there is tried. option: the argument that gave the path.
    """
    try:
        if not folder and path.is_dir():
            raise RequestError(f"{option}: got {path}, which is a folder; expected the name of a file in it.")
        at = path if folder else path.parent
        while not at.exists():
            at = at.parent
        with tempfile.TemporaryFile(dir=at):
            pass
    except OSError as error:
        raise RequestError(
            f"{option}: got {path}, where nothing can be written ({error.strerror}). Choose another place."
        ) from error


def writable_file(text: str) -> Path:
    """A type of argparse's."""
    try:
        check_writable("the file", Path(text))
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)
