"""text_encoder/token_table.safetensors: the text encoder's table of tokens, where it lies in a file of its own.

Rows are looked up on the host (runtime/token_table.py), in the file as it is mapped, so its layout is checked before: one tensor,
(rows, channels) in the text encoder's precision. docs/bundle.md describes the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from engines.errors import BundleError, ManifestError
from engines.spec import Precision
from engines.strict import loads

__all__ = ["TABLE_NAME", "TENSOR", "table_offset"]

TABLE_NAME = "text_encoder/token_table.safetensors"  # in a bundle
TENSOR = "token_table"
MAX_HEADER = 4096  # bytes of JSON; ours has about a hundred
_DTYPES = {Precision.FP32: "F32", Precision.FP16: "F16", Precision.BF16: "BF16"}


def table_offset(path: Path, *, rows: int, channels: int, precision: Precision) -> int:
    """Where the first row begins, in bytes. Raises BundleError for a file that is no table of this shape and type."""
    if precision not in _DTYPES:
        raise BundleError(f"{path}: got a table of tokens of precision {precision}; expected {', '.join(_DTYPES)}. Rebuild.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length
        if length > MAX_HEADER or begin > size:
            raise BundleError(
                f"{path}: got {size} bytes that do not begin as a safetensors file; expected the text encoder's table of tokens. "
                "Copy the file again, or rebuild."
            )
        try:
            header = loads(file.read(length), source=str(path))
        except ManifestError as error:
            raise BundleError(str(error)) from None
    tensor = header.get(TENSOR) if isinstance(header, dict) else None
    if not isinstance(tensor, dict):
        raise BundleError(f"{path}: got no tensor {TENSOR!r}; expected the text encoder's table of tokens. Rebuild the bundle.")
    dtype = _DTYPES[precision]
    num_bytes = rows * channels * (4 if dtype == "F32" else 2)
    expected = {"dtype": dtype, "shape": [rows, channels], "data_offsets": [0, num_bytes]}
    for key, value in expected.items():
        if repr(tensor.get(key)) != repr(value):  # True and 1.0 equal 1
            raise BundleError(f"{path}: {TENSOR}: {key}: got {tensor.get(key)!r}; expected {value!r}. Rebuild the bundle.")
    if size - begin != num_bytes:
        raise BundleError(
            f"{path}: got {size - begin} bytes of rows; expected {num_bytes}. Copy the file again, or rebuild the bundle."
        )
    return begin
