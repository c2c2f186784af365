"""Linear layers as nodes that cuBLASLt computes: y = x w^T (+ bias), summed in fp32 (plugins/cublas_lt.py).

A graph for TensorRT has such nodes only where that is faster (export/linear_nodes.py puts them there), so no function body is
needed: every other reader has MatMul.
"""

from collections.abc import Sequence
from typing import Any

from plugins.launch import Expression, Launch, Output, Product

__all__ = ["DOMAIN", "OP", "TYPES", "attributes"]

OP = "Linear"
DOMAIN = "sana"
TYPES = ("fp16", "bf16")


def attributes(dtype: str, rank: int, columns: int, depth: int, *, bias: bool) -> dict[str, Any]:
    """Every attribute of a `sana::Linear` node: inputs x (…, depth) of `rank` dimensions, weight (columns, depth) and, with `bias`,
    (columns,); output (…, columns); all of `dtype`. Raises ValueError for a dtype that is not one of TYPES."""
    if dtype not in TYPES:
        raise ValueError(f"{OP}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}")
    leading: Sequence[Expression] = [["dim", 0, axis] for axis in range(rank - 1)]
    rows: Expression = 1
    for size in leading:
        rows = size if rows == 1 else ["mul", rows, size]
    launch = Launch(
        op=OP,
        inputs=[dtype] * (3 if bias else 2),
        outputs=[Output(type=dtype, shape=[*leading, columns])],
        grid=[1, 1, 1],
        args=[],
        kernels={},
        product=Product(rows=rows, columns=columns, depth=depth),
    )
    return {"plugin_version": "1", "plugin_namespace": "", "launch": launch.to_json(), "cubins": b"\0"}
