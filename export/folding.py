"""Weights that a graph for TensorRT computes from parameters, computed before it is compiled.

A decoder's upsampling convolutions sum neighbouring taps of their weights (sana_ref.fused_decoder.of_corners). TensorRT folds views
of parameters, and would compute those sums again at every picture. The portable graph is left alone: ONNX Runtime folds them when
it loads one, and in fp32, while they are rounded here.
"""

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from export.linear_nodes import remove_unused

__all__ = ["FOLDED_NAME", "fold_weights"]

FOLDED_NAME = "folded.bin"  # beside the graph, as long as it is compiled
_VIEWS = frozenset(
    {
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Expand",
        "Gather",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_TORCH = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
_PAGE = 4096  # bytes; where a weight starts, so that it can be mapped


def fold_weights(model: onnx.ModelProto, folder: Path) -> int:
    """Replace, in place, sums of parameters by constants, whose data is FOLDED_NAME in `folder`. Returns how many there are.

    folder: where the graph's own data lies. Quantized weights are left: what they are made of is smaller than they are.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    maker: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if all(name in constants or not name for name in node.input) and node.op_type != "DequantizeLinear":
            constants.update(node.output)
            maker.update(dict.fromkeys(node.output, node))
    used = {name for node in graph.node if node.output[0] not in constants for name in node.input}
    computed = [name for name in maker if name in used and any(node.op_type not in _VIEWS for node in _makers(name, maker))]
    if not computed:
        return 0
    types = {value.name: value.type.tensor_type for value in graph.value_info}
    with (folder / FOLDED_NAME).open("wb") as file:
        for name in computed:
            array = _value(model, name, _makers(name, maker), folder).to(_TORCH[types[name].elem_type])
            file.write(bytes(-file.tell() % _PAGE))
            data = array.contiguous().view(torch.uint8).numpy().tobytes()
            tensor = TensorProto(name=name, data_type=types[name].elem_type, dims=array.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", FOLDED_NAME), ("offset", file.tell()), ("length", len(data))):
                tensor.external_data.add(key=key, value=str(value))
            file.write(data)
            graph.initializer.append(tensor)
            maker[name].output[list(maker[name].output).index(name)] = f"{name}_unused"
    remove_unused(graph)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return len(computed)


def _makers(name: str, maker: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that it is made by, each behind those that it depends on."""
    if name not in maker:
        return []
    nodes = [*(node for each in maker[name].input for node in _makers(each, maker)), maker[name]]
    return list({id(node): node for node in nodes}.values())


def _value(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto], folder: Path) -> torch.Tensor:
    """fp32, by ONNX Runtime: NumPy has no bf16."""
    leaves = {each for node in nodes for each in node.input}
    result = helper.make_node("Cast", [name], ["result"], to=TensorProto.FLOAT)
    part = helper.make_graph(
        [*nodes, result],
        "weights",
        [],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in leaves],
    )
    import onnxruntime  # only here: few graphs have such weights, and a machine that compiles engines may be without

    versions = [each for each in model.opset_import if each.domain == ""]
    path = folder / "weights.onnx"
    path.write_bytes(helper.make_model(part, opset_imports=versions, ir_version=model.ir_version).SerializeToString())
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {})[0])
    finally:
        path.unlink()
