"""Plugins' nodes through their ONNX function bodies, as every reader without plugins runs them."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import FunctionProto, NodeProto, helper
from torch import Tensor

Sizes = Sequence[int | str]  # a name: any number


def run_bodies(
    nodes: Sequence[NodeProto],
    bodies: Sequence[FunctionProto],
    inputs: Mapping[str, tuple[Tensor, Sizes]],
    outputs: Mapping[str, tuple[torch.dtype, Sizes]],
) -> list[Tensor]:
    """The outputs that ONNX Runtime computes on the CPU, of a graph of `nodes` that ONNX's checker accepts."""

    def value(name: str, dtype: torch.dtype, sizes: Sizes) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
        return helper.make_tensor_value_info(name, kind, sizes)

    graph = helper.make_graph(
        nodes,
        "bodies",
        [value(name, t.dtype, sizes) for name, (t, sizes) in inputs.items()],
        [value(name, *each) for name, each in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(bodies[0].domain, 1)]
    model = helper.make_model(graph, functions=bodies, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {name: t.numpy() for name, (t, _) in inputs.items()})
    return [torch.from_numpy(each) for each in found]
