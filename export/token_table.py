"""The text encoder's table of tokens as a file of its own: written beside its graphs, and read as the runtime reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from safetensors.torch import save_file
from torch import Tensor

from engines.golden import Golden
from engines.token_table import TABLE_NAME, TENSOR
from export.components import Component
from export.weights import converted
from runtime.token_table import TokenTable
from sana_ref.components import TOKEN_TABLE

__all__ = ["TABLE_FILE", "with_rows", "write_token_table"]

TABLE_FILE = PurePosixPath(TABLE_NAME).name


def write_token_table(component: Component, load: Callable[[str], Tensor], folder: Path) -> int:
    """Write `folder`/TABLE_FILE, in the component's type. Returns bytes of rows.

    load: parameter name -> tensor as the checkpoint stores it. Raises CheckpointError as export.weights.converted.
    """
    shape = tuple(component.module.get_parameter(TOKEN_TABLE).shape)
    table = converted(TOKEN_TABLE, load(TOKEN_TABLE), shape, component.dtype)
    save_file({TENSOR: table}, folder / TABLE_FILE)
    return table.numel() * table.itemsize


def with_rows(component: Component, folder: Path, golden: Mapping[str, Golden]) -> dict[str, Golden]:
    """Cases as the component's graphs take them: of a table on the host with its rows, which the runtime looks up in the file."""
    if not component.on_host:
        return dict(golden)
    rows, channels = component.module.get_parameter(TOKEN_TABLE).shape
    table = TokenTable(folder / TABLE_FILE, rows=rows, channels=channels, precision=component.precision)
    return {case: replace(each, inputs=table.looked_up(each.inputs)) for case, each in golden.items()}
