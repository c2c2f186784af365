"""The TensorRT module itself: found, made loadable, imported, and given a logger. The one place that imports it.

TensorRT for RTX (`tensorrt_rtx`) is tested, with 1.6 and 1.7. The full TensorRT 11 (`tensorrt`) is not tested: its wheels are not
on the public package index. If both are installed, RTX is used.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import logging
import re
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.errors import BuildError, TensorRTVersionError

__all__ = ["check_parser", "flavor", "load", "logger", "version", "why"]

LOG = logging.getLogger(__name__)
RTX, FULL = "tensorrt_rtx", "tensorrt"
_MEMORY = re.compile(r"^Total (Weights|Activation|Device Persistent) Memory: (\d+) bytes")
_NO_DRIVER = "cudaError 35"  # what TensorRT's clean-up logs, as an error, after every build on a machine without a driver

_parser_works = True  # False if the ONNX parser would abort the process at its first plugin


@functools.cache
def load() -> ModuleType:
    """The TensorRT module. Raises TensorRTVersionError if neither is installed."""
    name = next((name for name in (RTX, FULL) if find_spec(name)), None)
    if name is None:
        raise TensorRTVersionError(
            f"got no TensorRT; expected the Python module {RTX} or {FULL}. "
            "Install it with `pip install tensorrt-rtx-cu13`, or use the onnxruntime back end."
        )
    if name == RTX:
        _link_core_library()
    return importlib.import_module(name)


def _link_core_library() -> None:
    """Make `libtensorrt_rtx.so`, which the ONNX parser opens at its first plugin and which the wheel ships as `.so.1` only.

    Without it the process aborts. The link goes beside the library. Where that folder cannot be written, the libraries are loaded
    through a temporary folder of links instead: the parser looks beside the path that it was loaded from.
    """
    global _parser_works
    spec = find_spec(f"{RTX}_libs")
    if spec is None or not spec.submodule_search_locations:
        return  # installed by the system, which has its own links
    folder = Path(spec.submodule_search_locations[0])
    plain, core = folder / "libtensorrt_rtx.so", next(iter(sorted(folder.glob("libtensorrt_rtx.so.*"))), None)
    if core is None or plain.exists():
        return
    try:
        plain.symlink_to(core.name)
        LOG.info("made the link %s -> %s, by which the ONNX parser opens it", plain, core.name)
    except FileExistsError:
        pass  # another process was quicker
    except OSError as error:
        if f"{RTX}_libs" in sys.modules:
            _parser_works = False
            LOG.warning("%s cannot be made (%s) and %s is imported already: engines run, and cannot be built", plain, error, RTX)
            return
        links = Path(tempfile.mkdtemp(prefix="sana-tensorrt-"))
        atexit.register(shutil.rmtree, links, ignore_errors=True)
        for library in folder.glob("*.so.*"):
            (links / library.name).symlink_to(library)
        (links / plain.name).symlink_to(core)
        for library in sorted(links.glob("*.so.*"), key=lambda path: path.name != core.name):  # the core first
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        LOG.info("%s cannot be made (%s); loaded TensorRT through links in %s", plain, error, links)


def flavor() -> str:
    """ "rtx" or "full"."""
    return "rtx" if load().__name__ == RTX else "full"


def version() -> str:
    """TensorRT's version, such as "1.7.1.116". Engines run on the version that built them."""
    return str(load().__version__)


@functools.cache
def logger() -> Any:
    """TensorRT's messages in Python's log, and the latest errors for why(). One for the process: TensorRT keeps the first."""
    trt: Any = load()
    severity = trt.ILogger.Severity
    levels = {severity.VERBOSE: logging.DEBUG, severity.INFO: logging.DEBUG, severity.WARNING: logging.WARNING}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            # the thread that asked for what failed, or 0 for a thread of TensorRT's own; the message
            self.errors: deque[tuple[int, str]] = deque(maxlen=50)
            self.lock = threading.Lock()
            self.listener: Callable[[str], object] | None = None
            self.memory: dict[str, int] = {}  # bytes, of the engine that is built: Weights, Activation, Device Persistent

        def log(self, level: Any, message: str) -> None:
            rank = levels.get(level, logging.ERROR)
            if rank == logging.ERROR and _NO_DRIVER in message:
                rank = logging.DEBUG
            if rank == logging.ERROR:
                # Engines load in several threads at once: each is told of its own errors. Python has a dummy for foreign threads.
                own = not isinstance(threading.current_thread(), threading._DummyThread)
                with self.lock:
                    self.errors.append((threading.get_ident() if own else 0, message.strip()))
            if level == severity.INFO and (found := _MEMORY.search(message)):
                # of an engine for several architectures each is said in turn
                self.memory[found[1]] = max(self.memory.get(found[1], 0), int(found[2]))
            if rank > logging.DEBUG and self.listener is not None:
                self.listener(message)
            LOG.log(rank, "%s", message)

        def clear(self) -> None:
            """Forget the errors of this thread, and of TensorRT's own."""
            with self.lock:
                kept = [entry for entry in self.errors if entry[0] not in (0, threading.get_ident())]
                self.errors.clear()
                self.errors.extend(kept)

        def mine(self) -> list[str]:
            """The errors of this thread, and of TensorRT's own."""
            with self.lock:
                return [message for thread, message in self.errors if thread in (0, threading.get_ident())]

    return Logger()


def why() -> str:
    """The errors that TensorRT logged for this thread since they were last cleared, as the end of a message."""
    errors = "\n  ".join(logger().mine())
    return f" TensorRT says:\n  {errors}" if errors else " TensorRT gave no reason."


def check_parser() -> None:
    """Raises BuildError where the ONNX parser would abort the process at its first plugin."""
    if not _parser_works:
        raise BuildError(
            f"got {RTX} imported before engines.tensorrt.load() from a folder that cannot be written; expected load() first, "
            "or a link libtensorrt_rtx.so beside libtensorrt_rtx.so.1. The ONNX parser would abort the process."
        )
