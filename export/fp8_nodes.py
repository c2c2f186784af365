"""FP8 linear layers in a graph for TensorRT: weights in 8 bits with a scale a row, activations with a scale a token or a layer.

A token's scale is its largest number over 448, found by the kernel that quantises it, and where a modulated norm or a block's gated
sum makes the activations, that is their kernel (plugins/gated_sum.py). Those of attention and of the depth-wise convolution do not
see a whole token; where a scale was calibrated for the layer behind them, they quantise with that (plugins/static_scale.py).
cuBLASLt multiplies (plugins/cublas_lt.py); sums and results are as in fp16. Quantised are the layers of the transformer's blocks.
The embeddings and the last projection, small in work, stay fp16, and so does linear attention between the layers, whose sums over
all tokens would gather the error.

sana_ref/quantized.py is the same in PyTorch. TensorRT knows the bits as int8, which plugins take and give.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import helper, numpy_helper

from export.linear_nodes import remove_unused
from export.quantized_constants import DATA_NAME, Constants
from plugins import cross_attention, fp8_quantize, gated_depthwise_conv, gated_sum, linear, modulated_norm, qkv_linear_attention
from plugins.static_scale import OUT_SCALE
from sana_ref.quantization import QuantizationPlan, group_of

__all__ = ["QUANTIZED", "has_static_scale", "use_fp8"]

QUANTIZED = "quantized"  # the attribute of a modulated norm whose second output is bits, with a third, their scales
_NORMS = (modulated_norm.GATED, modulated_norm.PLAIN)
_STATIC = (cross_attention.OP, gated_depthwise_conv.OP, qkv_linear_attention.APPLY)  # kernels that quantise with a given scale
_STATIC_GROUPS = ("attn1.to_out.0", "attn2.to_out.0", "ff.conv_point")  # what reads their outputs
_LARGEST = float(gated_sum.LARGEST.value)


def has_static_scale(group: str) -> bool:
    """Whether the activations of a group of layers come from a kernel that quantises with a scale that it is given."""
    return group.endswith(_STATIC_GROUPS)


def use_fp8(model: onnx.ModelProto, folder: Path, plan: QuantizationPlan) -> dict[str, int]:
    """Rewrite, in place, the `sana::Linear` of each group that the plan has in fp8. Returns how many nodes of each op were added.

    folder: where the graph's weights are; their bits are written to DATA_NAME there. A group without an input_scale has a scale
    for each token, found while it runs.
    Raises ValueError for a weight whose sides are no multiples of linear.FP8_MULTIPLE, and for a scale of a layer before which no
    kernel takes it.
    """
    formats = {group: layer.format for group, layer in plan.layers.items()}
    input_scales = {group: layer.input_scale for group, layer in plan.layers.items() if layer.input_scale is not None}
    graph = _Graph(model.graph, folder)
    group_by_weight = {
        node.input[1]: next((found for name in graph.sources(node.input[1]) if (found := group_of(name))), "")
        for node in model.graph.node
        if node.op_type == linear.OP
    }
    chosen = [
        node
        for node in model.graph.node
        if node.op_type == linear.OP and formats.get(group_by_weight[node.input[1]], "none") == "fp8"
    ]
    quantized: dict[str, tuple[str, str]] = {}
    unused = dict(input_scales)
    counts = {linear.FP8: 0, fp8_quantize.OP: 0, gated_sum.OP: 0}
    with (folder / DATA_NAME).open("wb") as file:
        for node in chosen:
            x, weight, *bias = node.input
            group = group_by_weight[weight]
            source = graph.maker_behind(x, node, chosen, _STATIC if group in input_scales else _NORMS) or x
            if source not in quantized:
                scale_of_all = graph.give_scale(source, input_scales[group]) if group in input_scales else None
                quantized[source], added = (scale_of_all, None) if scale_of_all else graph.quantize(source, chosen)
                if scale_of_all:
                    del unused[group]
                if added is not None:
                    counts[added] += 1
            bits, scale = graph.add_weight_and_scales(weight, file)
            columns, depth = graph.shapes[weight]
            made = linear.fp8_attributes(graph.rank(source), columns, depth, bias=bool(bias))
            inputs = [quantized[source][0], bits, quantized[source][1], scale, *bias]
            replacement = helper.make_node(linear.FP8, inputs, [*node.output], name=node.name, domain=linear.DOMAIN, **made)
            node.CopyFrom(replacement)
            counts[linear.FP8] += 1
    if unused:
        raise ValueError(
            f"input_scales: got {', '.join(sorted(unused))}; expected layers behind one of {', '.join(_STATIC)}, alone. Leave the "
            "others out: their scales are found while they run"
        )
    remove_unused(model.graph)
    return {op: count for op, count in counts.items() if count}


class _Graph(Constants):
    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        super().__init__(graph, folder)
        values = (*graph.value_info, *graph.input, *graph.output)
        self.types: dict[str, Any] = {value.name: value.type.tensor_type for value in values}
        self.shapes: dict[str, tuple[int, int]] = {}  # of weights

    def rank(self, name: str) -> int:
        return len(self.types[name].shape.dim)

    def readers(self, name: str) -> Iterator[onnx.NodeProto]:
        """Nodes that read it, also reshaped."""
        for node in self.graph.node:
            if name in node.input:
                if node.op_type == "Reshape" and node.input[0] == name:
                    yield from self.readers(node.output[0])
                else:
                    yield node

    def maker_behind(self, x: str, reader: onnx.NodeProto, chosen: list[onnx.NodeProto], ops: tuple[str, ...]) -> str | None:
        """What one of these ops made, where x is that or a reshape of it, and layers that will be FP8 are all that read it.

        A layer that reads it before it was reshaped has another shape as well: only where that is reshaped next, it may.
        """
        name = x
        while name in self.maker and self.maker[name].op_type == "Reshape":
            name = self.maker[name].input[0]
        maker = self.maker.get(name)
        result = 1 if ops is _NORMS else 0  # a norm's first output is the sum
        if maker is None or maker.op_type not in ops or maker.output[result] not in (name, f"{name}_bits"):
            return None
        next_nodes = [node for node in self.graph.node if reader.output[0] in node.input]
        free = name == x or all(node.op_type == "Reshape" and self._is_whole(node.input[1]) for node in next_nodes)
        return name if free and all(node in chosen or node.op_type == linear.FP8 for node in self.readers(name)) else None

    def _is_whole(self, shape: str) -> bool:
        """Whether a reshape to this shape asks for nothing that depends on the shape before."""
        return shape not in self.constants or 0 not in numpy_helper.to_array(self.constants[shape])

    def quantize(self, x: str, chosen: list[onnx.NodeProto]) -> tuple[tuple[str, str], str | None]:
        """The names of x's bits and scales; and the op that was added for them, None if the norm that makes x does it."""
        bits, scale = f"{x}_bits", f"{x}_scale"
        maker = self.maker.get(x)
        if maker is not None and maker.op_type in _NORMS and all(node in chosen for node in self.readers(x)):
            maker.output[1] = bits
            maker.output.append(scale)
            maker.attribute.append(helper.make_attribute(QUANTIZED, 1))
            return (bits, scale), None
        if maker is not None and (gated := self.gated_sum(maker)) is not None:
            inputs, row = gated
            maker.CopyFrom(helper.make_node(gated_sum.OP, inputs, [x, bits, scale], name=bits, domain=linear.DOMAIN, row=row))
            return (bits, scale), gated_sum.OP
        node = helper.make_node(fp8_quantize.OP, [x], [bits, scale], name=bits, domain=linear.DOMAIN)
        first = next(index for index, each in enumerate(self.graph.node) if x in each.input)
        self.graph.node.insert(first, node)
        return (bits, scale), fp8_quantize.OP

    def give_scale(self, x: str, scale: float) -> tuple[str, str] | None:
        """The names of x's bits and scales, where the kernel that makes x takes a scale and one layer reads it; else None."""
        maker = self.maker.get(x)
        if maker is None or maker.op_type not in _STATIC or len(list(self.readers(x))) != 1:
            return None
        maker.output[0] = f"{x}_bits"
        maker.output.append(f"{x}_scale")
        maker.attribute.append(helper.make_attribute(OUT_SCALE, scale))
        return f"{x}_bits", f"{x}_scale"

    def gated_sum(self, node: onnx.NodeProto) -> tuple[list[str], int] | None:
        """(inputs of a gated sum, the gate's row) if the node is the last of

        Add(x, Mul(Add(Gather(table), Unsqueeze(Gather(Reshape(time)))), Clip(branch))), as a block has it in fp16.
        """
        if node.op_type != "Add":
            return None
        for x, product in (tuple(node.input), tuple(node.input)[::-1]):
            mul = self.made(product, "Mul")
            clip = mul and next((found for name in mul.input if (found := self.made(name, "Clip"))), None)
            gate = mul and next((found for name in mul.input if (found := self.made(name, "Add"))), None)
            if clip is None or gate is None or len(clip.input) != 3:
                continue
            limits = [float(self.value(name)) if name in self.constants else 0.0 for name in clip.input[1:]]
            row_of_table = self.made(gate.input[0], "Gather")
            wide = self.made(gate.input[1], "Unsqueeze")
            row_of_time = wide and self.made(wide.input[0], "Gather")
            rows_of_time = row_of_time and self.made(row_of_time.input[0], "Reshape")
            if row_of_table is None or row_of_time is None or rows_of_time is None or limits != [-_LARGEST, _LARGEST]:
                continue
            table, time = row_of_table.input[0], rows_of_time.input[0]
            row, same = (self.value(each.input[1]) for each in (row_of_table, row_of_time))
            axes = [(helper.get_node_attr_value(each, "axis") if each.attribute else 0) for each in (row_of_table, row_of_time)]
            whole = table in self.constants and self.rank(time) == 2
            if whole and row.ndim == 0 and row == same and axes == [0, 1]:
                return [x, clip.input[0], time, table], int(row)
        return None

    def made(self, name: str, op: str) -> onnx.NodeProto | None:
        """The node of this op that makes it."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == op else None

    def add_weight_and_scales(self, name: str, file: BinaryIO) -> tuple[str, str]:
        """The names of a weight's bits and scales, as new constants."""
        scale_name, (bits_name, scale) = f"{name}_scale", self.add_weight(name, "fp8", file)
        columns, depth = self.constants[bits_name].dims
        self.shapes[name] = (columns, depth)
        if scale_name not in self.constants:
            self.add(numpy_helper.from_array(scale.numpy(), scale_name))
        return bits_name, scale_name
