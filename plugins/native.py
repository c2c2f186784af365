"""The plugin shell in C++ (plugins/cpp), where it is installed: a launch outside a CUDA graph costs less than through Python.

Same names and fields as plugins/shell.py, so an engine that either built runs with the other. Which one is used is decided once a
process and TensorRT module, and logged: TensorRT has one plugin of a name.
"""

import logging
import os
from pathlib import Path
from types import ModuleType

from plugins import cublas_lt

__all__ = ["PYTHON", "VARIABLE", "library_path", "load_native"]

VARIABLE = "SANA_PLUGINS"  # the library's path, or PYTHON for the shell in Python
PYTHON = "python"
_CUBLAS_LT = "SANA_CUBLASLT"  # where the library looks for cuBLASLt
_BESIDE = Path(__file__).with_name("libsana_plugins.so")

_loaded: dict[str, bool] = {}  # by TensorRT module: whether the library is used


def library_path() -> Path | None:
    """The library to use, None for the shell in Python. A path that SANA_PLUGINS names need not exist: loading it then fails."""
    named = os.environ.get(VARIABLE, "")
    if named == PYTHON:
        return None
    if named:
        return Path(named)
    return _BESIDE if _BESIDE.exists() else None


def load_native(trt: ModuleType) -> bool:
    """Have TensorRT load the library, and with it all plugins of plugins.shell.OPS. False if the shell in Python is to be used.

    Raises RuntimeError if there is a library and TensorRT does not take it.
    """
    if trt.__name__ not in _loaded:
        path = library_path()
        if path is not None:
            # The same cuBLASLt as the shell in Python would use: another may give other bits.
            os.environ.setdefault(_CUBLAS_LT, ":".join(cublas_lt.paths()))
            if not path.is_file() or trt.get_plugin_registry().load_library(str(path)) is None:
                raise RuntimeError(
                    f"{path}: TensorRT cannot load the plugins; expected the library that plugins/cpp builds. Build it again, or "
                    f"set {VARIABLE}={PYTHON} for the plugins in Python"
                )
        logging.getLogger(__name__).info("plugins of %s: %s", trt.__name__, "in Python" if path is None else f"in C++, {path}")
        _loaded[trt.__name__] = path is not None
    return _loaded[trt.__name__]
