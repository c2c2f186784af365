"""What a build stage's result depends on besides its inputs: our source code, and the versions of what it calls."""

import functools
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.digest import file_sha256

__all__ = ["code", "versions"]

_ROOT = Path(__file__).resolve().parent.parent
# Which distributions to ask for the version of what is imported under another name, or built for another CUDA.
_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "triton",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "tokenizers",
    "numpy",
)


@functools.cache
def _digest(path: Path) -> str:
    return file_sha256(path)


def code(patterns: Iterable[str]) -> dict[str, str]:
    """Digests of our own source files that match, by path from the root of the repository.

    patterns: like "sana_ref/*.py". Raises FileNotFoundError for a pattern that matches nothing: a stage would not notice changes.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = sorted(_ROOT.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{_ROOT / pattern}: no such source file; expected one or more")
        found |= {path.relative_to(_ROOT).as_posix(): _digest(path) for path in paths}
    return found


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a build makes; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
