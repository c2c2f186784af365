"""Weights that a graph computes from parameters, computed once and stored in their place.

A decoder's upsampling convolutions sum neighbouring taps of their weights (sana_ref.fused_decoder.of_corners). ONNX Runtime does
so when it loads a graph; TensorRT does it again at every picture. Views of parameters stay: TensorRT folds those itself.
"""

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

__all__ = ["fold_weights"]

_VIEWS = frozenset({"Cast", "Concat", "ConstantOfShape", "Expand", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"})


def fold_weights(model: ir.Model, load: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Replace, in place, what is computed from parameters alone by parameters, in a graph whose own have no values yet.

    load: parameter name -> tensor as the checkpoint stores it. Returns `load` for the rewritten graph; it gives new ones in fp32.
    """
    constants = set(model.graph.initializers.values())
    made: dict[str, Callable[[], Tensor]] = {}
    for node in model.graph:
        if all(value is None or value in constants for value in node.inputs):
            constants.update(node.outputs)
    for value in [value for node in model.graph for value in node.outputs if value in constants]:
        uses = [use for use in value.uses() if constants.isdisjoint(use.node.outputs)]
        nodes = _makers(value)
        parameters = [each for each in _leaves(nodes) if each.const_value is None]
        if not uses or not parameters or all(node.op_type in _VIEWS for node in nodes):
            continue
        name = f"{parameters[0].name}.{value.name}"
        model.graph.initializers[name] = stored = ir.Value(name=name, type=value.type, shape=value.shape)
        for use in uses:
            use.node.replace_input_with(use.idx, stored)
        made[name] = _computation(nodes, value, model.opset_imports[""], load)
    passes.RemoveUnusedNodesPass()(model)
    return lambda name: made[name]() if name in made else load(name)


def _makers(value: ir.Value) -> list[ir.Node]:
    """The nodes that it is made by, each behind those that it depends on."""
    node = value.producer()
    if node is None:
        return []
    return list(dict.fromkeys([*(each for x in node.inputs if x is not None for each in _makers(x)), node]))


def _leaves(nodes: list[ir.Node]) -> list[ir.Value]:
    return list(dict.fromkeys(value for node in nodes for value in node.inputs if value is not None and value.producer() is None))


def _computation(nodes: list[ir.Node], result: ir.Value, opset: int, load: Callable[[str], Tensor]) -> Callable[[], Tensor]:
    """By ONNX Runtime, between casts to and from fp32, because NumPy has no bf16."""
    leaves = _leaves(nodes)
    names = [str(each.name) for each in leaves if each.const_value is None]
    casts = [
        helper.make_node("Cast", [f"{each.name}.fp32"], [str(each.name)], to=int(each.dtype or TensorProto.FLOAT))
        for each in leaves
        if each.const_value is None
    ]
    casts.append(helper.make_node("Cast", [str(result.name)], ["result.fp32"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        [*casts[:-1], *(ir.to_proto(node) for node in nodes), casts[-1]],
        "weights",
        [helper.make_tensor_value_info(f"{name}.fp32", TensorProto.FLOAT, None) for name in names],
        [helper.make_tensor_value_info("result.fp32", TensorProto.FLOAT, None)],
        [ir.to_proto(each.const_value) for each in leaves if each.const_value is not None],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)

    def compute() -> Tensor:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {f"{name}.fp32": load(name).float().numpy() for name in names})[0])

    return compute
