"""Linear layers of a graph for TensorRT as plugins, for the one GPU architecture where that is worth it.

TensorRT for RTX has no kernels for the tensor cores of compute capability 9.0: a product that sums in fp32 takes it up to 2.8
times as long as cuBLASLt (plugins/cublas_lt.py has the numbers). Elsewhere its own kernels, which fuse what comes behind, stay.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from engines.spec import Target
from plugins import linear

__all__ = ["remove_unused", "use_linear_plugins", "wants_linear_plugins"]

# Columns: products of fewer leave multiprocessors idle. q, k and v of Gemma-2-2B, 600 rows, on an H200: 34 us, joined 20.
MAX_JOINED = 8192
_NARROW = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_OF_CONSTANTS = frozenset({"Cast", "Concat", "Reshape", "Transpose"})  # what may lie between a weight and its product


def wants_linear_plugins(targets: tuple[Target, ...], flavor: str) -> bool:
    return flavor == "rtx" and targets == (Target.SM90,)


def use_linear_plugins(model: onnx.ModelProto) -> int:
    """Rewrite, in place, each half-precision product of activations with a weight, the casts around it (export/accumulation.py) and
    the bias behind it as one node `sana::Linear`; small ones of the same activations as one for all. Returns how many there are."""
    graph = _Graph(model.graph)
    count = 0
    for node in list(model.graph.node):
        if node.op_type in ("MatMul", "Gemm") and node.domain == "":
            count += graph.replace(node)
    of_same: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type == linear.OP and len(node.input) == 2 and node.input[1] in graph.constants:
            of_same[node.input[0]].append(node)
    for nodes in of_same.values():
        if len(nodes) > 1 and sum(graph.sizes(node.input[1])[0] for node in nodes) <= MAX_JOINED:
            graph.join(nodes)
            count -= len(nodes) - 1
    remove_unused(model.graph)
    if count and linear.DOMAIN not in {each.domain for each in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(linear.DOMAIN, 1))
    return count


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(output.name for output in graph.output)
        values = (*graph.value_info, *graph.input, *graph.output)
        self.types: Mapping[str, Any] = {value.name: value.type.tensor_type for value in values}

    def users(self, name: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.graph.node if name in node.input)

    def is_constant(self, name: str) -> bool:
        node = self.maker.get(name)
        if node is None:
            return name in self.constants
        return node.op_type in _OF_CONSTANTS and all(self.is_constant(each) for each in node.input)

    def uncast(self, name: str) -> str:
        """What a cast to fp32 was made of, or the name itself."""
        node = self.maker.get(name)
        if node is not None and node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == TensorProto.FLOAT:
            return str(node.input[0])
        return name

    def weight(self, node: onnx.NodeProto) -> str | None:
        """The name of the constant (columns, depth), if that is what the product's second input is a view of."""
        name = self.uncast(node.input[1])
        if not self.is_constant(name):
            return None
        if node.op_type == "Gemm":
            wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
            given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            return name if {**{"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}, **given} == wanted else None
        made = self.maker.get(name)
        if made is None or made.op_type != "Transpose" or list(helper.get_node_attr_value(made, "perm")) != [1, 0]:
            return None
        return str(made.input[0])

    def replace(self, node: onnx.NodeProto) -> int:
        """1 if the product is now a plugin, else 0."""
        x, weight = self.uncast(node.input[0]), self.weight(node)
        kind = self.types.get(x)
        if weight is None or kind is None or kind.elem_type not in _NARROW:
            return 0
        last = node
        if x != node.input[0]:  # an fp16 product in fp32: its cast back belongs to it
            cast = self.only_user(node, "Cast")
            if cast is None or helper.get_node_attr_value(cast, "to") != kind.elem_type:
                return 0
            last = cast
        inputs, (columns, depth) = [x, weight], self.sizes(weight)
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            inputs.append(self.uncast(node.input[2]))
        elif added := self.only_user(last, "Add"):
            bias = next(
                (each for each in added.input if each in self.constants and [*self.constants[each].dims] == [columns]), None
            )
            if bias is not None:
                inputs.append(bias)
                last = added
        out = last.output[0]
        attributes: dict[str, Any] = linear.attributes(
            _NARROW[kind.elem_type], len(kind.shape.dim), columns, depth, bias=len(inputs) == 3
        )
        made = helper.make_node(linear.OP, inputs, [out], name=f"{node.name}_linear", domain=linear.DOMAIN, **attributes)
        last.output[0] = f"{out}_unused"
        place = next(
            index for index, each in enumerate(self.graph.node) if each.name == last.name and each.output[0] == last.output[0]
        )
        self.graph.node.insert(place, made)
        return 1

    def join(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Linear nodes without a bias, of one x, as one whose columns are split, or are what a Concat made of them again."""
        first, weights = nodes[0], [node.input[1] for node in nodes]
        columns, depth = [self.sizes(weight)[0] for weight in weights], self.sizes(weights[0])[1]
        name, kind = f"{first.name}_joined", self.types[first.input[0]]
        outputs, again = [node.output[0] for node in nodes], self.concat_of(nodes, rank=len(kind.shape.dim))
        attributes: dict[str, Any] = linear.attributes(
            _NARROW[kind.elem_type], len(kind.shape.dim), sum(columns), depth, bias=False
        )
        out = f"{name}_out" if again is None else again.output[0]
        made = [
            helper.make_node("Concat", weights, [f"{name}_weight"], name=f"{name}_weight", axis=0),
            helper.make_node(linear.OP, [first.input[0], f"{name}_weight"], [out], name=name, domain=linear.DOMAIN, **attributes),
        ]
        if again is not None:
            self.graph.node.remove(again)
        else:
            self.graph.initializer.append(helper.make_tensor(f"{name}_columns", TensorProto.INT64, [len(columns)], columns))
            made.append(helper.make_node("Split", [out, f"{name}_columns"], outputs, name=f"{name}_split", axis=-1))
        place = next(index for index, each in enumerate(self.graph.node) if each.name == first.name)
        for number, node in enumerate(made):
            self.graph.node.insert(place + number, node)
        for node in nodes:
            self.graph.node.remove(node)

    def concat_of(self, nodes: Sequence[onnx.NodeProto], *, rank: int) -> onnx.NodeProto | None:
        """What puts the columns of all of them side by side, in their order, if nothing else uses them."""
        concat = self.only_user(nodes[0], "Concat")
        if concat is None or helper.get_node_attr_value(concat, "axis") not in (-1, rank - 1):
            return None
        outputs = [node.output[0] for node in nodes]
        return concat if list(concat.input) == outputs and all(self.uses[each] == 1 for each in outputs) else None

    def only_user(self, node: onnx.NodeProto, op: str) -> onnx.NodeProto | None:
        name = node.output[0]
        if self.uses[name] != 1:
            return None
        return next((user for user in self.users(name) if user.op_type == op), None)

    def sizes(self, name: str) -> tuple[int, int]:
        """(columns, depth) of a constant."""
        if name in self.constants:
            columns, depth = self.constants[name].dims
        else:
            columns, depth = (dim.dim_value for dim in self.types[name].shape.dim)
        return int(columns), int(depth)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes that nothing uses, from the end."""
    used = Counter(name for node in graph.node for name in node.input)
    used.update(output.name for output in graph.output)
    kept = []
    for node in reversed(graph.node):
        if any(used[name] for name in node.output):
            kept.append(node)
        else:
            used.subtract(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
