"""`sana data`: hands its arguments to `python -m train.data`, which prepares training data and looks at it.

In a process of its own, as `sana build`: an app must not import train, and only there is PyTorch needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from engines.errors import SanaError

__all__ = ["DESCRIPTION", "HELP", "NAME", "add_arguments", "run"]

NAME = "data"
HELP = "prepare training data and look at it (needs the extra 'train')"
DESCRIPTION = HELP
PROGRAM = "train.data"
NEEDS = ("torch", "webdataset")  # looked for, never imported here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing: what follows `sana data` is never parsed here. Its name and help appear in `sana --help`."""


def run(arguments: Sequence[str]) -> int:
    """The other program's exit code; 128 + n if signal n ended it. Raises SanaError if the extra is not installed."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    package = importlib.util.find_spec("train")
    if missing or package is None or package.origin is None:
        what = f"{', '.join(missing)} not installed" if missing else "the package 'train' is not installed"
        raise SanaError(f"data: {what}. Training needs more than drawing does; run: pip install 'sana-deploy[train]'")
    # A file train.py in the working folder, as many have, must not stand in for the package, neither here nor in its workers.
    root = str(Path(package.origin).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-m", PROGRAM, *arguments], env=environment) as child:

        def pass_on(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            code = _wait(child)
        finally:
            signal.signal(signal.SIGTERM, before)
    return 128 - code if code < 0 else code


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Ctrl-C reaches the child too, from the terminal; it finishes with a message, and this waits until it has."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue
