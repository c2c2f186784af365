"""FP8 or INT8 convolutions in the decoder's graph for TensorRT: those of its residual blocks, which hold most of its work.

A convolution wants bits that were quantised with one scale, which is known before (export/plans.py). The kernel that makes a
picture writes them where it can (plugins/conv3x3_quantized.py): a block's first convolution in place of its result, which only the
second reads; the second, with the norm, beside its result, which is also the next block's residual. Elsewhere a pass of its own
quantises (plugins/static_quantize.py): at the head of a stage, behind its upsampling or attention; and between blocks of more than
conv3x3.MAX_NORM channels, whose norm is TensorRT's.

sana_ref/quantized_convs.py is the same in PyTorch, and says which convolutions have a group. TensorRT knows the bits as int8.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.linear_nodes import remove_unused
from export.quantized_constants import DATA_NAME, Constants
from plugins import conv3x3, conv3x3_quantized, static_quantize
from plugins.eight_bits import KINDS, Kind
from plugins.static_scale import OUT_SCALE
from sana_ref.quantization import QuantizationPlan
from sana_ref.quantized_convs import conv_group

__all__ = ["use_quantized_convs"]

_QUANTIZED = {of: op for op, of in conv3x3_quantized.OPS.items()}  # by format and the op in 16 bits


def use_quantized_convs(model: onnx.ModelProto, folder: Path, plan: QuantizationPlan) -> dict[str, int]:
    """Rewrite, in place, the `sana::Conv3x3` and `sana::Conv3x3Norm` of each group that the plan has in fp8 or int8. Returns how
    many more nodes of each op there are: below zero for those that were replaced.

    folder: where the graph's weights are; their bits are written to DATA_NAME there.
    Raises ValueError for a group that the graph has not, another format, both together, or one without input_scale.
    """
    nodes = _nodes(model.graph, folder)
    scales = {group: layer.input_scale for group, layer in plan.layers.items() if layer.format != "none"}
    kinds = sorted({layer.format for layer in plan.layers.values()} - {"none"})
    kind = next((each for each in KINDS if kinds == [each]), None)
    wrong = sorted(group for group, scale in scales.items() if scale is None or group not in nodes)
    if kind is None or wrong:
        raise ValueError(
            f"the decoder's plan: got {', '.join([*kinds, *wrong]) or 'no format'}; expected {' or '.join(KINDS)}, and an "
            f"input_scale for each of {', '.join(nodes) or 'nothing'}"
        )
    chosen = [(node, float(np.float32(scale))) for group, node in nodes.items() if (scale := scales.get(group)) is not None]
    graph = _Graph(model.graph, folder, kind, [node for node, _ in chosen])
    bits = [graph.quantize(node.input[0], scale) for node, scale in chosen]  # of all, before any node changes its inputs
    counts: Counter[str] = Counter({static_quantize.OP[kind]: graph.add_passes()})
    with (folder / DATA_NAME).open("wb") as file:
        for (node, scale), x in zip(chosen, bits, strict=True):
            weight, row_scales = graph.add_weight(node.input[1], kind, file)
            both = numpy_helper.from_array(np.float32(scale) * row_scales.numpy(), f"{weight}_scales")  # of x, of channels' weights
            graph.add(both)
            op = _QUANTIZED[kind, node.op_type]
            counts.update({node.op_type: -1, op: 1})
            node.op_type = op
            node.input[:] = [x, weight, both.name, *node.input[2:]]
    remove_unused(model.graph)
    return {op: count for op, count in counts.items() if count}


def _nodes(graph: onnx.GraphProto, folder: Path) -> dict[str, onnx.NodeProto]:
    """The convolutions that are groups, by group."""
    constants, found = Constants(graph, folder), {}
    for node in graph.node:
        if node.op_type in (conv3x3.OP, conv3x3.NORM) and node.domain == conv3x3.DOMAIN:
            group = next((each for name in constants.sources(node.input[1]) if (each := conv_group(name))), None)
            if group is not None:
                found[group] = node
    return found


class _Graph(Constants):
    """chosen: the nodes that will be quantised. kind: to what."""

    def __init__(self, graph: onnx.GraphProto, folder: Path, kind: Kind, chosen: list[onnx.NodeProto]) -> None:
        super().__init__(graph, folder)
        self.kind = kind
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(output.name for output in graph.output)
        self.types = {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}
        self.makers = {node.output[0]: node for node in chosen}
        self.bits: dict[tuple[str, float], str] = {}  # by what was quantised, and its scale
        self.passes: list[onnx.NodeProto] = []

    def quantize(self, x: str, scale: float) -> str:
        """The name of x's bits: from the kernel that makes x, if it is one of the chosen, else from a pass."""
        if (x, scale) in self.bits:
            return self.bits[x, scale]
        name = self.bits[x, scale] = f"{x}_bits" if f"{x}_bits" not in self.bits.values() else f"{x}_bits_{len(self.bits)}"
        maker = self.makers.get(x)
        if maker is not None and maker.op_type == conv3x3.NORM and len(maker.output) == 1:
            maker.output.append(name)
            maker.attribute.append(helper.make_attribute(OUT_SCALE, scale))
        elif maker is not None and maker.op_type == conv3x3.OP and self.uses[x] == 1:
            maker.output[0] = name
            maker.attribute.append(helper.make_attribute(OUT_SCALE, scale))
        else:
            op, domain = static_quantize.OP[self.kind], static_quantize.DOMAIN
            self.passes.append(helper.make_node(op, [x], [name], name=name, domain=domain, scale=scale))
        self._add_type(name, x)
        return name

    def _add_type(self, name: str, x: str) -> None:
        value = onnx.ValueInfoProto(name=name)
        value.type.CopyFrom(self.types[x])
        value.type.tensor_type.elem_type = TensorProto.INT8
        self.graph.value_info.append(value)

    def add_passes(self) -> int:
        """Put them into the graph, each before the first node that reads what it reads. Returns how many there are."""
        for node in self.passes:
            first = next(index for index, each in enumerate(self.graph.node) if node.input[0] in each.input)
            self.graph.node.insert(first, node)
        return len(self.passes)
