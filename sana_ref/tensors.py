"""Where a component's weights are, and reading them one by one, straight from the mapped file.

A source knows the shape of every tensor from the files' headers alone, so a model and its weights are compared before anything is
read, and loading holds no second copy. Only formats that cannot run code are read: safetensors here, restricted .pth in pth_layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.errors import CheckpointError

__all__ = ["Part", "RenamedSource", "SafetensorsSource", "TensorSource", "find_weights", "load_tensor", "read_header", "read_json"]

FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


class TensorSource(Protocol):
    """Tensors by name. `shapes` is known before any is read; `files` are all the files that they come from."""

    shapes: Mapping[str, tuple[int, ...]]
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the type it was stored in; mapped from the file where the format allows."""
        ...


class SafetensorsSource:
    """One safetensors file, or several that hold a part each. Raises CheckpointError for a file that is not whole."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in shapes:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {self._file_of[name].name}; expected it once.")
                if entry["dtype"] not in FLOATS:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is stored as {entry['dtype']}; expected one of {', '.join(FLOATS)}. "
                        "These weights are quantized: use the repository's unquantized ones."
                    )
                shapes[name] = tuple(entry["shape"])
                self._file_of[name] = file
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str) -> Tensor:
        # Opened for each tensor: the mapping then ends with the tensor, and a build does not fill memory with files it has read.
        file = self._file_of[name]
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error}). Download it again.") from None


class RenamedSource:
    """Another source under other names, each tensor whole or one of `parts` equal parts along dimension 0."""

    def __init__(self, source: TensorSource, plan: Mapping[str, Part]) -> None:
        self.files = source.files
        self._source = source
        self._plan = plan
        self.shapes: Mapping[str, tuple[int, ...]] = {}
        for name, part in plan.items():
            shape = source.shapes[part.name]
            if part.of > 1 and (not shape or shape[0] % part.of):
                raise CheckpointError(f"tensor {part.name!r} has shape {shape}; expected {part.of} equal parts along dimension 0.")
            self.shapes[name] = (shape[0] // part.of, *shape[1:]) if part.of > 1 else shape

    def read(self, name: str) -> Tensor:
        part = self._plan[name]
        tensor = self._source.read(part.name)
        return tensor if part.of == 1 else tensor.chunk(part.of)[part.index]


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `of` equal parts of the tensor `name`."""

    name: str
    index: int = 0
    of: int = 1


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, without its metadata: name to dtype, shape, data_offsets.

    Raises CheckpointError if the file is not safetensors, or is shorter or longer than its header says (a download that broke off).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: got {size} bytes and a header of {length}; expected a whole safetensors file. "
                "The download broke off or the file is something else (a Git LFS pointer?): download it again."
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            str(name): {
                "dtype": str(entry["dtype"]),
                "shape": [int(n) for n in entry["shape"]],
                "data_offsets": [int(n) for n in entry["data_offsets"]],
            }
            for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: its header is not that of a safetensors file ({error!r}). Download it again.") from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file}: got {size} bytes; expected {8 + length + end}, as its header says. The download broke off: download it again."
        )
    return tensors


def find_weights(folder: Path, stem: str, variant: str | None) -> tuple[SafetensorsSource, str | None]:
    """The weights in a component's folder, and the variant that they are (None: the plain ones).

    stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers). variant: "fp16" or "bf16" files are preferred if
    present, else the plain ones are taken, as diffusers does. Raises CheckpointError if there are none, or not all.
    """
    for kind in dict.fromkeys((variant, None)):
        single = folder / (f"{stem}.safetensors" if kind is None else f"{stem}.{kind}.safetensors")
        index = folder / (f"{stem}.safetensors.index.json" if kind is None else f"{stem}.safetensors.index.{kind}.json")
        if index.is_file():
            return _sharded(index), kind
        if single.is_file():
            return SafetensorsSource((single,)), kind
    raise CheckpointError(_nothing_found(folder, stem, variant))


def _sharded(index: Path) -> SafetensorsSource:
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise CheckpointError(f"{index}: no weight_map of tensor names to files. Download the index again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {name!r}; expected the bare name of a .safetensors file beside it.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}. "
            "The download is not complete: start it again, it goes on where it stopped."
        )
    source = SafetensorsSource(tuple(index.parent / name for name in names))
    if lost := sorted(weight_map.keys() - source.shapes.keys()):
        raise CheckpointError(
            f"{index}: names the tensor {lost[0]!r}, which no file holds. Index and files do not belong together."
        )
    return source


def _nothing_found(folder: Path, stem: str, variant: str | None) -> str:
    expected = f"expected {stem}.safetensors" + (f" or {stem}.{variant}.safetensors" if variant else "")
    if not folder.is_dir():
        return f"{folder}: no such folder; {expected} in it. Is this a diffusers-format checkpoint, and is its download complete?"
    others = sorted(path.name for path in folder.glob("*.safetensors*"))
    if others:
        kinds = sorted({kind for kind in ("fp16", "bf16") if any(kind in name for name in others)})
        hint = " ".join(f"Pass variant={kind!r}." for kind in kinds) or "Is its download complete?"
        return f"{folder}: got {', '.join(others)}; {expected}. {hint}"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: got only {', '.join(pickles)}, a pickle, which can run code when it is read; {expected}. "
            "Use a revision with safetensors, or convert the file in a sandbox."
        )
    return f"{folder}: holds no weights; {expected}. Is its download complete?"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, if it is missing or not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file. Is this a diffusers-format checkpoint, and is its download complete?"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a JSON {type(value).__name__}; expected an object.")
    return value


def load_tensor(source: TensorSource, name: str, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    """A tensor in the type (None: as stored) and on the device asked for; still mapped from the file if nothing changes."""
    return source.read(name).to(device=device, dtype=dtype)
