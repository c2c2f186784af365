"""From the typed graph to the portable one: the same nodes and the same stored weights, computed in fp32.

ONNX Runtime has no bf16 kernels on CPUs and few fp16 ones, so the portable graph casts each stored weight to fp32 where it is used
and computes in fp32 throughout. It is derived node by node from the typed graph, not exported a second time: what ONNX Runtime
verifies on any machine is therefore the structure and the constants that TensorRT compiles.
"""

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from engines.errors import BuildError
from export.fp4_nodes import without_fp4
from export.weight_only_nodes import portable_tables, rounded

__all__ = ["widened"]

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_KNOWN_DTYPE_ATTRIBUTES = frozenset({("Cast", "to"), ("ConstantOfShape", "value"), ("Constant", "value")})


def widened(typed: ir.Model) -> ir.Model:
    """A copy of `typed` that computes in fp32, inputs and outputs included. Parameters keep their stored type and bytes (FP4 only
    the bytes: ONNX Runtime has no such type). What 16-bit weights are dequantised to is rounded to 16 bits here too.

    Without any fp16 or bf16 the copy equals the original. Raises BuildError for a node whose type is set in a way not known here.
    """
    model = typed.clone()
    graph = model.graph
    without_fp4(model)
    dequantized = portable_tables(model)
    for value in graph.inputs:
        if value.dtype in HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in graph.all_nodes():
        _widen_node(node)
    for value in list(graph.initializers.values()):
        if value.dtype in HALF:
            _widen_initializer(graph, value)
    _remove_needless_casts(graph)
    for value, dtype in dequantized:
        rounded(graph, value, dtype)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _widen_node(node: ir.Node) -> None:
    for attribute in node.attributes.values():
        key = (node.op_type, attribute.name)
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF:
            if key not in _KNOWN_DTYPE_ATTRIBUTES:
                raise BuildError(f"widen: {node.op_type}.{attribute.name} holds a 16-bit tensor; expected none in this op")
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _to_fp32(attribute.as_tensor()))
        elif key == ("Cast", "to") and ir.DataType(attribute.as_int()) in HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        elif attribute.name in ("dtype", "output_datatype") and ir.DataType(attribute.as_int()) in HALF:
            raise BuildError(f"widen: {node.op_type}.{attribute.name} is a 16-bit type; expected none in this op")
    for value in node.outputs:
        if value.dtype in HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _to_fp32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(np.asarray(tensor.numpy(), dtype=np.float32), name=tensor.name)


def _widen_initializer(graph: ir.Graph, value: ir.Value) -> None:
    stored = value.const_value
    if stored is not None and not isinstance(stored, ir.ExternalTensor):  # a constant of the graph itself
        value.const_value = _to_fp32(stored)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return
    uses = list(value.uses())
    lookups = [(node, index) for node, index in uses if node.op_type == "Gather" and index == 0]
    for node, _ in lookups:  # cast the rows that were looked up, not a table of 256,000
        rows = node.outputs[0]
        followers = list(rows.uses())
        rows.type = value.type
        cast = _cast(rows, f"{rows.name}_fp32")
        graph.insert_after(node, cast)
        for follower, index in followers:
            follower.replace_input_with(index, cast.outputs[0])
    others = [use for use in uses if use not in lookups]
    if others:
        cast = _cast(value, f"{value.name}_fp32")
        graph.insert_before(graph[0], cast)
        for node, index in others:
            node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"cast_{name}")
    cast.outputs[0].name = name
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = value.shape
    return cast


def _remove_needless_casts(graph: ir.Graph) -> None:
    """Casts between fp32 and fp32, which is what the typed graph's changes of precision have become."""
    outputs = set(graph.outputs)
    for node in list(graph):
        if node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
            continue
        if ir.DataType(node.attributes["to"].as_int()) != ir.DataType.FLOAT:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if result in outputs:
            node.op_type = "Identity"
            node.attributes.clear()
            continue
        for user, index in list(result.uses()):
            user.replace_input_with(index, source)
        graph.remove(node, safe=True)
