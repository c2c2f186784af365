"""parity/<component>.safetensors: inputs, and what the reference makes of them. Written at build time, read by `sana verify`.

One file holds one or more cases (a batch, a size). The tensors of a case are named `<case>/input/<name>`, `<case>/output/<name>`.
Inputs that fp16 holds exactly may be stored so, in half the space; whoever loads them gets fp32, as every session takes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.errors import BundleError
from engines.spec import ComponentName

__all__ = ["Golden", "golden_name", "load_golden", "save_golden"]

_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})/(input|output)/([A-Za-z0-9_.-]{1,64})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Golden:
    inputs: dict[str, np.ndarray]  # by the graph's names
    outputs: dict[str, np.ndarray]  # fp32 or fp64, the reference's


def golden_name(component: ComponentName) -> str:
    return f"parity/{component}.safetensors"


def save_golden(path: Path, cases: Mapping[str, Golden]) -> None:
    """Write `cases` (by name: letters, digits, - and _) to a file that load_golden reads."""
    from safetensors.numpy import save_file

    tensors = {
        f"{case}/{kind}/{name}": np.ascontiguousarray(array)
        for case, golden in cases.items()
        for kind, arrays in (("input", golden.inputs), ("output", golden.outputs))
        for name, array in arrays.items()
    }
    wrong = [name for name in tensors if not _NAME.fullmatch(name)]
    if wrong:
        raise ValueError(f"got the tensor name {wrong[0]!r}; expected <case>/input|output/<name> of letters, digits, - and _")
    save_file(tensors, str(path))


def load_golden(path: Path) -> dict[str, Golden]:
    """The cases of a file, by name. Raises BundleError for one that is not such a file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a safetensors file ({error}). Copy it again, or rebuild.") from None
    cases: dict[str, Golden] = {}
    for key, array in tensors.items():
        match = _NAME.fullmatch(key)
        if match is None:
            raise BundleError(f"{path}: got the tensor {key!r}; expected <case>/input/<name> or <case>/output/<name>. Rebuild.")
        case, kind, name = match.groups()
        golden = cases.setdefault(case, Golden(inputs={}, outputs={}))
        if kind == "input":
            golden.inputs[name] = array.astype(np.float32) if array.dtype == np.float16 else array
        else:
            golden.outputs[name] = array
    incomplete = [case for case, golden in cases.items() if not golden.inputs or not golden.outputs]
    if incomplete or not cases:
        what = f"the case {incomplete[0]!r} without inputs or outputs" if incomplete else "no cases"
        raise BundleError(f"{path}: got {what}; expected both. Rebuild.")
    return cases
