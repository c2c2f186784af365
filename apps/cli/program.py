"""Commands that belong to a room that an app must not import: their arguments go to a program of it, in a process of its own.

There PyTorch is loaded, and its memory goes back when the program ends.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from engines.errors import SanaError

__all__ = ["PROGRAMS", "Program"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """`sana NAME ARGUMENTS` runs `python -m MODULE ARGUMENTS`. needs: packages that are looked for, never imported here."""

    module: str
    help: str
    needs: Sequence[str]

    @property
    def extra(self) -> str:
        """What installs it: the extras have the names of the rooms."""
        return self.module.partition(".")[0]

    def run(self, arguments: Sequence[str]) -> int:
        """The program's exit code; 128 + n if signal n ended it. Raises SanaError if what it needs is not installed."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        package = importlib.util.find_spec(self.extra)
        if missing or package is None or package.origin is None:
            what = f"{', '.join(missing)} not installed" if missing else f"the package {self.extra!r} is not installed"
            raise SanaError(f"{self.module}: {what}. It needs more than drawing does; run: pip install 'sana-deploy[{self.extra}]'")
        # A file train.py in the working folder, as many have, must not stand in for the package, neither here nor in its workers.
        root = str(Path(package.origin).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
        with subprocess.Popen([sys.executable, "-m", self.module, *arguments], env=environment) as child:

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


PROGRAMS = {
    "build": Program(
        module="export.build_engine",
        help="make a bundle from a checkpoint (needs the extra 'export')",
        needs=("torch", "transformers", "onnx", "onnxscript", "triton"),
    ),
    "data": Program(
        module="train.data",
        help="prepare training data and look at it (needs the extra 'train')",
        needs=("torch", "webdataset"),
    ),
    "train": Program(
        module="train.run",
        help="train what an experiment describes (needs the extra 'train')",
        needs=("torch",),
    ),
    "checkpoint": Program(
        module="train.parallel",
        help="a training checkpoint in diffusers' layout, and back (needs the extra 'train')",
        needs=("torch", "safetensors"),
    ),
}
