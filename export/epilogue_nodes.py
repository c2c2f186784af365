"""INT8 and FP8 activations straight from the kernels that make them, in a graph for TensorRT.

A quantised graph has QuantizeLinear before each product of INT8 or FP8 (export/qdq_nodes.py). TensorRT makes it the end of a kernel
of its own before it; behind a plugin there is none, and a kernel reads and writes the activations once more:

    plugin -> [Reshape, Cast to fp32] -> QuantizeLinear -> DequantizeLinear -> product

Where all that reads a plugin's output are QuantizeLinear with one scale, to one type and without a zero point, the plugin gets the
scale and gives the numbers itself (plugins/static_scale.py), and TensorRT makes one product of narrow numbers of what is left:

    plugin -> [Reshape] -> DequantizeLinear -> product

Attention, the depth-wise convolution and modulated norms have such kernels. What they divide is their result in fp32, and not that
rounded to fp16, as QuantizeLinear reads it: where it is nearly halfway between two numbers, the other one may come out. A product
with `inverse_smooth` in between stays, and with it QuantizeLinear. Graphs for ONNX Runtime are not rewritten; cuBLASLt's products
of FP8 have nodes of their own (export/fp8_nodes.py).
"""

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper, numpy_helper

from export.linear_nodes import remove_unused
from export.translation import SANA_DOMAIN
from plugins import cross_attention, gated_depthwise_conv, modulated_norm, qkv_linear_attention
from plugins.static_scale import OUT_KIND, OUT_SCALE, OutKind

__all__ = ["use_epilogues"]

_KINDS: dict[int, OutKind] = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "e4m3"}  # by type of the zero point

_RESULT = {  # which output of these ops can be in 8 bits; a norm's first is the sum
    cross_attention.OP: 0,
    gated_depthwise_conv.OP: 0,
    modulated_norm.GATED: 1,
    modulated_norm.PLAIN: 1,
    qkv_linear_attention.APPLY: 0,
}


def use_epilogues(model: onnx.ModelProto) -> int:
    """Rewrite, in place, every node of _RESULT that may give numbers in 8 bits. Returns how many did."""
    graph = _Graph(model.graph)
    count = sum(graph.rewrite(node) for node in model.graph.node if node.domain == SANA_DOMAIN and node.op_type in _RESULT)
    if count:
        remove_unused(model.graph)
    return count


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {value.name: value.type.tensor_type for value in graph.value_info}
        self.outputs = {value.name for value in graph.output}

    def rewrite(self, node: onnx.NodeProto) -> int:
        """1 if the node now gives numbers in 8 bits, else 0."""
        name = node.output[_RESULT[node.op_type]]
        found = {self.scale(reader) for reader in self.readers(name)}
        if len(found) != 1 or (given := found.pop()) is None:
            return 0
        scale, kind = given
        node.attribute.append(helper.make_attribute(OUT_SCALE, scale))
        node.attribute.append(helper.make_attribute(OUT_KIND, _KINDS[kind]))
        self.narrow(name, name, kind)
        return 1

    def reading(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if name in node.input]

    def readers(self, name: str) -> Iterator[onnx.NodeProto | None]:
        """Nodes that read it, also reshaped and in fp32. None: whoever reads the graph's output."""
        if name in self.outputs:
            yield None
        for node in self.reading(name):
            wide = node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == TensorProto.FLOAT
            if wide or node.op_type == "Reshape":
                yield from self.readers(node.output[0])
            else:
                yield node

    def scale(self, node: onnx.NodeProto | None) -> tuple[float, int] | None:
        """Of a QuantizeLinear to one of _KINDS with one scale, a constant, and no zero point; with that type. Else None."""
        if node is None or node.op_type != "QuantizeLinear" or len(node.input) != 3 or node.output[0] in self.outputs:
            return None
        scale, zero = (self.constants.get(name) for name in node.input[1:])
        if scale is None or zero is None or zero.data_type not in _KINDS or [*scale.dims, *zero.dims]:
            return None
        return None if numpy_helper.to_array(zero) else (float(numpy_helper.to_array(scale)), zero.data_type)

    def narrow(self, name: str, numbers: str, kind: int) -> None:
        """What reads a tensor reads its numbers of this type from now on, and Casts and QuantizeLinear no more."""
        if name == numbers:
            self.types[name].elem_type = kind
        for node in self.reading(name):
            (out,) = node.output
            if node.op_type == "Reshape":
                node.input[0] = numbers
                self.narrow(out, out, kind)
            elif node.op_type == "Cast":
                self.narrow(out, numbers, kind)
            else:
                for reader in self.reading(out):
                    reader.input[:] = [numbers if each == out else each for each in reader.input]
