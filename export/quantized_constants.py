"""Constants of a graph for TensorRT, read and added: what the writers of FP8 and of INT8 nodes share.

The graph is not loaded with its weights: they are read one at a time from the file beside it, and new bits go to another one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sana_ref.quantize_ops import Rows, quantize_weight

__all__ = ["DATA_NAME", "Constants"]

DATA_NAME = "quantized.bin"  # beside the graph, as long as it is compiled


class Constants:
    """Of a graph in `folder`. maker: the node that makes each tensor, in the graph as it was."""

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self.graph, self.folder = graph, folder
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}

    def sources(self, name: str) -> Iterator[str]:
        """The initializers that a constant is made of."""
        if name in self.constants:
            yield name
        for each in self.maker[name].input if name in self.maker else ():
            yield from self.sources(each)

    def value(self, name: str) -> NDArray[Any]:
        """Of a constant, evaluated. Raises ValueError where it is made by another op than a weight's."""
        if name in self.constants:
            tensor = self.constants[name]
            if tensor.data_location != TensorProto.EXTERNAL:
                return numpy_helper.to_array(tensor)
            where = {entry.key: entry.value for entry in tensor.external_data}  # onnx reads no file that has a second name
            count = int(np.prod(tensor.dims, dtype=np.int64))
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            data = np.fromfile(self.folder / where["location"], kind, count, offset=int(where.get("offset", 0)))
            return data.reshape(tuple(tensor.dims))
        node = self.maker[name]
        inputs = [self.value(each) for each in node.input]
        if node.op_type == "Concat":
            return np.concatenate(inputs, axis=helper.get_node_attr_value(node, "axis"))
        if node.op_type == "Reshape":
            return inputs[0].reshape([n or inputs[0].shape[i] for i, n in enumerate(inputs[1].tolist())])
        if node.op_type == "Transpose":
            return inputs[0].transpose(helper.get_node_attr_value(node, "perm"))
        raise ValueError(f"weight {name!r}: got it from a {node.op_type}; expected a Concat, a Reshape or a Transpose of constants")

    def add_weight(self, name: str, kind: Rows, file: BinaryIO) -> tuple[str, torch.Tensor]:
        """The name of a weight's bits as a new constant, and the scales of its rows, along its first dimension, fp32.

        file: DATA_NAME, to which the bits go. Raises CheckpointError for a weight without a range.
        """
        bits_name, value = f"{name}_bits", self.value(name)
        wide = np.ascontiguousarray(value, np.float32)  # PyTorch does not know numpy's bf16
        made = quantize_weight(torch.from_numpy(wide).flatten(1), kind, name)
        if bits_name not in self.constants:
            tensor = TensorProto(name=bits_name, data_type=TensorProto.INT8, dims=value.shape, data_location=TensorProto.EXTERNAL)
            for key, number in (("location", DATA_NAME), ("offset", file.tell()), ("length", made.numbers.numel())):
                tensor.external_data.add(key=key, value=str(number))
            file.write(made.numbers.view(torch.uint8).numpy().tobytes())
            self.add(tensor)
        return bits_name, made.scale

    def add(self, tensor: TensorProto) -> None:
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor
