"""Writing a graph's external data straight from the checkpoint, one tensor at a time.

Both graphs of a component, the typed and the portable one, refer to the same file, so a weight exists once on disk and at most once
in memory while it is converted. Tensors lie sorted by name; those of a page or more start on a page, so that readers can map them.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from engines.errors import CheckpointError

__all__ = ["DATA_NAME", "PORTABLE_NAME", "TYPED_NAME", "converted", "parameter_names", "write_weights"]

DATA_NAME = "model.onnx.data"
PORTABLE_NAME = "model.onnx"  # the portable graph, which goes into the bundle
TYPED_NAME = "typed.onnx"  # what TensorRT compiles; stays in the cache
_PAGE = 4096  # bytes; ONNX asks for external data to start on such a boundary
_SMALL = 64  # bytes; alignment of tensors that are smaller than a page
_TORCH = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
# Quantised numbers (export/qdq_nodes.py, export/weight_only_nodes.py), which come as they are stored; two of 4 bits are a byte.
_NARROW = {
    ir.DataType.INT4: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT4E2M1: torch.uint8,
}


def parameter_names(model: ir.Model) -> list[str]:
    """Initializers that wait for the checkpoint's bytes, sorted. Constants of the graph itself already have theirs."""
    return sorted(name for name, value in model.graph.initializers.items() if value.const_value is None)


def _as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, little-endian, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_weights(model: ir.Model, load: Callable[[str], Tensor], path: Path) -> int:
    """Write every parameter of `model` to `path` in the graph's type, and bind the graph to it. Returns bytes written.

    load: name -> CPU tensor of any floating type; called once a name, so it can read lazily. It raises CheckpointError for an
    unknown name. The bound location is the file's name: graph and data belong in one folder.
    Raises CheckpointError if a shape differs or a value overflows the component's precision.
    """
    slots: dict[str, ir.ExternalTensor] = {}
    with path.open("wb") as file:
        for name in parameter_names(model):
            value = model.graph.initializers[name]
            assert value.dtype is not None
            assert value.shape is not None
            if value.dtype in _NARROW:
                tensor = load(name).contiguous()
                assert tensor.dtype == _NARROW[value.dtype]
            else:
                tensor = converted(name, load(name), value.shape.numpy(), _TORCH[value.dtype])
            data = _as_bytes(tensor)
            alignment = _PAGE if len(data) >= _PAGE else _SMALL
            file.write(bytes(-file.tell() % alignment))
            offset = file.tell()
            file.write(data)
            slots[name] = ir.ExternalTensor(
                path.name, offset, len(data), value.dtype, shape=value.shape, name=name, base_dir=path.parent
            )
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    for name, slot in slots.items():
        model.graph.initializers[name].const_value = slot
    return size


def converted(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, contiguous. Raises CheckpointError for another shape, and for numbers that are not finite in `dtype`."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"weight {name!r}: got shape {tuple(tensor.shape)}; the config asks for {shape}. Fix config.json or the weights."
        )
    converted = tensor.to(dtype).contiguous()
    least, most = (float(x) for x in converted.aminmax())  # NaN if any is: isfinite() would copy gigabytes
    if not math.isfinite(most - least):
        least, most = (float(x) for x in tensor.aminmax())
        finite = math.isfinite(most - least)
        bad = f"overflows {dtype}: it reaches from {least:.3g} to {most:.3g}" if finite else "holds NaN or infinity"
        raise CheckpointError(f"weight {name!r} {bad}; expected finite numbers. Take another precision, or mend the checkpoint.")
    return converted
