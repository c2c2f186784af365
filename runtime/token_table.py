"""The text encoder's table of tokens where it stays on the host: rows are looked up in the file, which is mapped.

Of 1.2 GB of Gemma-2-2B a prompt touches some hundred rows of 4.6 kB: no others become resident, and none takes memory of the GPU.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BundleError
from engines.spec import Precision
from engines.token_table import TABLE_NAME, table_offset
from runtime.bfloat16 import from_bfloat16

__all__ = ["TokenTable"]

_STORED = {Precision.FP32: "<f4", Precision.FP16: "<f2", Precision.BF16: "<u2"}  # bfloat16: its bits


class TokenTable:
    """(rows, channels) in a file. The numbers are those of the file, exactly."""

    def __init__(self, path: Path, *, rows: int, channels: int, precision: Precision) -> None:
        """Raises BundleError for a file that is no table of this shape and type."""
        begin = table_offset(path, rows=rows, channels=channels, precision=precision)
        self._path, self._precision = path, precision
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # the kernel would read rows around each that nobody asks for
        numbers = np.frombuffer(mapped, _STORED[precision], rows * channels, begin)
        self._table: NDArray[Any] = numbers.reshape(rows, channels)

    @classmethod
    def of(cls, bundle: Bundle) -> Self | None:
        """The bundle's; None if its table is in graph and engines."""
        m = bundle.manifest
        if not m.token_table_rows:
            return None
        path, precision = bundle.file(TABLE_NAME), m.precision["text_encoder"]
        return cls(path, rows=m.token_table_rows, channels=m.caption_channels, precision=precision)

    def rows(self, ids: NDArray[np.integer[Any]], *, bits: bool = False) -> NDArray[Any]:
        """(B, S) -> (B, S, channels) float32; bits: a bfloat16 table's as uint16, which saves two conversions on the way to a GPU.

        Raises BundleError for an id that is no row, before it looks any up, and for ids that are no integers.
        """
        if ids.dtype.kind not in "iu":  # a golden file's may be anything
            raise BundleError(f"{self._path}: got token ids of {ids.dtype}; expected integers. Rebuild the bundle.")
        outside = ids[(ids < 0) | (ids >= len(self._table))]
        if outside.size:
            raise BundleError(
                f"{self._path}: got the token {outside.flat[0]}; expected 0 to {len(self._table) - 1}, the rows of the table. "
                "The tokenizer is of another model: rebuild the bundle."
            )
        found: NDArray[Any] = self._table[ids]
        if self._precision is not Precision.BF16:
            return found.astype(np.float32, copy=False)
        return found if bits else from_bfloat16(found)

    def looked_up(self, inputs: Mapping[str, NDArray[Any]], *, bits: bool = False) -> dict[str, NDArray[Any]]:
        """Inputs of a text encoder with the rows `inputs_embeds` in place of `input_ids`; those without ids as they are."""
        if "input_ids" not in inputs:
            return dict(inputs)
        others = {name: array for name, array in inputs.items() if name != "input_ids"}
        return {"inputs_embeds": self.rows(inputs["input_ids"], bits=bits), **others}
