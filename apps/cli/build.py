"""`sana build`: hands its arguments to `python -m export.build_engine`.

In a process of its own: an app must not import export, and torch's memory goes back when it ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from engines.errors import SanaError

__all__ = ["DESCRIPTION", "HELP", "NAME", "add_arguments", "run"]

NAME = "build"
HELP = "make a bundle from a checkpoint (needs the extra 'export')"
DESCRIPTION = HELP
PROGRAM = "export.build_engine"
NEEDS = ("torch", "transformers", "onnx", "onnxscript", "triton")  # looked for, never imported here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing: what follows `sana build` is never parsed here. Its name and help appear in `sana --help`."""


def run(arguments: Sequence[str]) -> int:
    """The other program's exit code; 128 + n if signal n ended it. Raises SanaError if the extra is not installed."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing or importlib.util.find_spec("export") is None:
        what = f"{', '.join(missing)} not installed" if missing else "the package 'export' is not installed"
        raise SanaError(f"build: {what}. Building needs more than drawing does; run: pip install 'sana-deploy[export]'")
    with subprocess.Popen([sys.executable, "-m", PROGRAM, *arguments]) as child:

        def pass_on(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            code = _wait(child)
        finally:
            signal.signal(signal.SIGTERM, before)
    return 128 - code if code < 0 else code


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Ctrl-C reaches the child too, from the terminal; it cleans up and ends, and this waits until it has."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue
