"""Linear layers as nodes that cuBLASLt computes: y = x w^T (+ bias), summed in fp32 (plugins/cublas_lt.py).

A graph for TensorRT has such nodes only where that is faster (export/linear_nodes.py puts them there), so no function body is
needed: every other reader has MatMul.
"""

import functools
from collections.abc import Sequence
from typing import Any

from plugins.launch import Expression, Launch, Output, Product

__all__ = ["DOMAIN", "FP8", "FP8_MULTIPLE", "OP", "TYPES", "attributes", "fp8_attributes"]

OP, FP8 = "Linear", "Fp8Linear"
DOMAIN = "sana"
TYPES = ("fp16", "bf16")
FP8_MULTIPLE = 16  # columns and depth have to be multiples of it


def attributes(dtype: str, rank: int, columns: int, depth: int, *, bias: bool) -> dict[str, Any]:
    """Every attribute of a `sana::Linear` node: inputs x (…, depth) of `rank` dimensions, weight (columns, depth) and, with `bias`,
    (columns,); output (…, columns); all of `dtype`. Raises ValueError for a dtype that is not one of TYPES."""
    if dtype not in TYPES:
        raise ValueError(f"{OP}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}")
    return _attributes(OP, [dtype] * (3 if bias else 2), dtype, rank, columns, depth)


def fp8_attributes(rank: int, columns: int, depth: int, *, bias: bool) -> dict[str, Any]:
    """Every attribute of a `sana::Fp8Linear` node: as `attributes`, but x and weight are the bits of FP8 (e4m3) as int8, and behind
    them come the scales of x's rows (…) and of weight's (columns,), fp32; output and bias are fp16.

    Raises ValueError for columns or depth that are no multiples of FP8_MULTIPLE.
    """
    if columns % FP8_MULTIPLE or depth % FP8_MULTIPLE:
        raise ValueError(f"{FP8}: got a weight {columns} x {depth}; expected multiples of {FP8_MULTIPLE}")
    return _attributes(FP8, ["int8", "int8", "fp32", "fp32", *(["fp16"] if bias else [])], "fp16", rank, columns, depth)


def _attributes(op: str, inputs: list[str], output: str, rank: int, columns: int, depth: int) -> dict[str, Any]:
    leading: Sequence[Expression] = [["dim", 0, axis] for axis in range(rank - 1)]
    launch = Launch(
        op=op,
        inputs=inputs,
        outputs=[Output(type=output, shape=[*leading, columns])],
        grid=[1, 1, 1],
        args=[],
        kernels={},
        product=Product(rows=functools.reduce(lambda rows, size: ["mul", rows, size], leading), columns=columns, depth=depth),
    )
    return {"plugin_version": "1", "plugin_namespace": "", "launch": launch.to_json(), "cubins": b"\0"}
