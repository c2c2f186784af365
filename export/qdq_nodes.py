"""A quantised graph, of the denoiser or the text encoder: narrow weights, and explicit QuantizeLinear and DequantizeLinear.

A product of the typed graph reads fp16 activations and weights through casts to fp32 (export/accumulation.py); one of bf16, as the
text encoder has, gets such casts here. Between those casts and the product, a planned group's activations are divided by `smooth`,
quantised and dequantised, and its weights are replaced by numbers that are dequantised: TensorRT joins them into one product of
narrow numbers. Scales are fp32: 16 bits would round them. Products of a group that are apart in the graph share their activations.

    int8, fp8, one scale         QuantizeLinear, DequantizeLinear
    int8, fp8, a scale a token   standard operators, for ONNX Runtime alone: TensorRT quantises with scales that are known before
    nvfp4                        TRT_FP4DynamicQuantize and two DequantizeLinear, in ONNX Runtime see export/fp4_nodes.py

The numbers are those of sana_ref/quantized.py, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor

from engines.errors import BuildError
from export.accumulation import widen_product
from sana_ref.fp8 import LEAST_SCALE
from sana_ref.quantization import LayerPlan, QuantizationPlan, group_of, groups_of, prefix_of
from sana_ref.quantize_ops import BLOCK, FP8_MAX, INT8_MAX
from sana_ref.quantized import QuantizedLayer, check_plan, quantize_layer

__all__ = ["TRT_DOMAIN", "is_dynamic", "quantize_graph"]

TRT_DOMAIN = "trt"
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_OF_CONSTANTS = frozenset({"Cast", "Concat", "Reshape", "Transpose"})  # what may lie between a weight and its product
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_NUMBERS = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN, "nvfp4": ir.DataType.FLOAT4E2M1}


def is_dynamic(layer: LayerPlan) -> bool:
    """Whether scales of activations are found a token at a time."""
    return layer.format in ("int8", "fp8") and layer.input_scale is None


def quantize_graph(
    model: ir.Model,
    plan: QuantizationPlan,
    load: Callable[[str], Tensor],
    dtype: torch.dtype,
    seen: Callable[[str, Tensor, QuantizedLayer], None] | None = None,
) -> Callable[[str], Tensor]:
    """Rewrite, in place, the product of every planned group of a graph whose parameters have no values yet.

    load: parameter name -> tensor as the checkpoint stores it. dtype: of the component, that the weights are rounded to before.
    seen: called with a group's name, its weight and what became of it.
    Returns `load` for the rewritten graph, which has other parameters: it quantises a group's weights when they are asked for.
    Raises SpecError for a plan that is not of this model, BuildError for a group that is no product of the graph.
    """
    names = groups_of(model.graph.initializers)
    check_plan(plan, names)
    products: dict[str, dict[ir.Node, list[str]]] = {}
    for node in model.graph:
        parts = _weights_of(node)
        if parts:
            products.setdefault(str(group_of(parts[0])), {})[node] = parts
    weights = _Weights(plan, names, load, dtype, seen)
    for group, layer in plan.layers.items():
        if layer.format == "none":
            continue
        found = products.get(group, {})
        if sorted(name for parts in found.values() for name in parts) != sorted(names[group]):
            raise BuildError(f"quantize: got no product with the weight of {group!r} in the graph; expected one.")
        _Rewrite(model.graph, found, group, layer, weights).run()
    model.opset_imports[TRT_DOMAIN] = 1
    passes.RemoveUnusedNodesPass()(model)
    if not any(node.domain == TRT_DOMAIN for node in model.graph):
        del model.opset_imports[TRT_DOMAIN]
    return weights


def _weights_of(node: ir.Node) -> list[str]:
    """The parameters, all of one group, that are the second factor of this node; none if that is something else."""
    if node.op_type not in _PRODUCTS or node.domain:
        return []
    sources = list(_sources(node.inputs[1]))
    groups = {group_of(name) for name in sources}
    return sources if len(groups) == 1 and None not in groups else []


def _sources(value: ir.Value | None) -> Iterator[str]:
    """The parameters that a value is a view of, several if joined; whatever shapes it is no part."""
    if value is None:
        return
    node = value.producer()
    if node is None:
        yield str(value.name)
    elif node.op_type in _OF_CONSTANTS:
        for each in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
            yield from _sources(each)
    else:
        yield ""  # of no parameter


def _is_plain_gemm(node: ir.Node) -> bool:
    """x @ w^T (+ bias)."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **given} == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


class _Weights:
    """Parameters of the rewritten graph, by name. One group is held, since its parameters are asked for one after the other."""

    def __init__(
        self,
        plan: QuantizationPlan,
        names: Mapping[str, Sequence[str]],
        load: Callable[[str], Tensor],
        dtype: torch.dtype,
        seen: Callable[[str, Tensor, QuantizedLayer], None] | None,
    ) -> None:
        self._plan, self._names, self._load, self._dtype, self._seen = plan, names, load, dtype, seen
        self._held: tuple[str, QuantizedLayer] | None = None
        self.made: dict[str, tuple[str, Callable[[QuantizedLayer], Tensor | None]]] = {}

    def rows_depth(self, group: str, graph: ir.Graph) -> tuple[dict[str, range], int]:
        """Which rows of the group's weight are each parameter's, and the depth of all."""
        rows, end, depth = {}, 0, 0
        for name in self._names[group]:
            shape = graph.initializers[name].shape
            assert shape is not None
            columns, depth = shape.numpy()[:2]
            rows[name] = range(end, end + columns)
            end += columns
        return rows, depth

    def prefix(self, group: str) -> str:
        """The group's name with what stands before it in the module's names."""
        return prefix_of(self._names[group][0]) + group

    def tensor(self, group: str, suffix: str) -> Tensor | None:
        return self._plan.tensor(group, suffix)

    def layer(self, group: str) -> QuantizedLayer:
        if self._held is None or self._held[0] != group:
            weight = torch.cat([self._load(name).to(self._dtype).flatten(1) for name in self._names[group]])
            self._held = group, quantize_layer(self._plan, group, weight)
            if self._seen is not None:
                self._seen(group, weight, self._held[1])
        return self._held[1]

    def __call__(self, name: str) -> Tensor:
        if name not in self.made:
            return self._load(name)
        group, field = self.made[name]
        tensor = field(self.layer(group))
        assert tensor is not None
        return tensor


class _Rewrite:
    """Of one group's products. All values it adds are fp32, but for numbers and their block scales."""

    def __init__(
        self, graph: ir.Graph, products: Mapping[ir.Node, Sequence[str]], group: str, layer: LayerPlan, weights: _Weights
    ) -> None:
        """products: node: names of its weights, in the order of the graph."""
        self.graph, self.products, self.group, self.plan, self.weights = graph, products, group, layer, weights
        self.node = next(iter(products))
        self.name = weights.prefix(group)
        self._added = 0  # nodes; for their names
        self.rows, self.depth = weights.rows_depth(group, graph)
        self.columns = sum(map(len, self.rows.values()))

    def run(self) -> None:
        source, x = self.source(), self.node.inputs[0]
        assert x is not None
        narrow = source.dtype if source.dtype in _HALF else None
        if self.weights.tensor(self.group, "smooth") is not None:
            inverse = self.parameter("inverse_smooth", ir.DataType.FLOAT, (self.depth,), lambda q: q.inverse_smooth)
            x = self.add("Mul", [x, inverse], like=x)
        real = self.activations(x)
        for node, names in self.products.items():
            node.replace_input_with(0, real)
            weight = self.weight(names)
            node.replace_input_with(1, self.transposed(weight) if node.op_type == "MatMul" else weight)
        down = self.weights.tensor(self.group, "low_rank_down")
        if down is not None:
            self.add_low_rank(x, int(down.shape[0]), narrow)

    def source(self) -> ir.Value:
        """What the products read, before a cast to fp32, which they have behind this."""
        found: list[ir.Value] = []
        for node in self.products:
            x = node.inputs[0]
            assert x is not None
            if x.dtype == ir.DataType.BFLOAT16:
                widen_product(self.graph, node)
                x = node.inputs[0]
                assert x is not None
            if x.dtype != ir.DataType.FLOAT or (node.op_type == "Gemm" and not _is_plain_gemm(node)):
                raise BuildError(
                    f"quantize, {self.group}: got a {node.op_type} of {x.dtype}; expected a product that is summed in fp32, of a "
                    "component in fp16, bf16 or fp32."
                )
            producer = x.producer()
            source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else x
            assert source is not None
            found.append(source)
        if any(each is not found[0] for each in found):
            raise BuildError(f"quantize, {self.group}: got products of unlike activations; expected them to share one input.")
        return found[0]

    def activations(self, x: ir.Value) -> ir.Value:
        kind, scale = self.plan.format, self.plan.input_scale
        if is_dynamic(self.plan):
            return self.a_scale_a_token(x)
        factor = self.constant("input_scale", np.array(scale, np.float32))
        if kind == "nvfp4":
            quantize = self.insert(
                ir.Node(
                    TRT_DOMAIN,
                    "TRT_FP4DynamicQuantize",
                    [x, factor],
                    [ir.AttrInt64("axis", -1), ir.AttrInt64("block_size", BLOCK), ir.AttrInt64("scale_type", int(_NUMBERS["fp8"]))],
                    num_outputs=2,
                    name=f"{self.name}.input_numbers",
                )
            )
            numbers, block_scale = quantize.outputs
            for value, suffix, dtype in ((numbers, "numbers", _NUMBERS["nvfp4"]), (block_scale, "block_scale", _NUMBERS["fp8"])):
                value.name, value.dtype = f"{self.name}.input_{suffix}", dtype
            assert x.shape is not None
            numbers.shape, block_scale.shape = x.shape, ir.Shape([*x.shape[:-1], self.depth // BLOCK])
            real = self.add("DequantizeLinear", [block_scale, factor], shape=block_scale.shape)
            return self.add("DequantizeLinear", [numbers, real], {"axis": -1, "block_size": BLOCK}, like=x)
        zero = self.constant("input_zero", np.zeros((), _NUMBERS[kind].numpy()))
        numbers = self.add("QuantizeLinear", [x, factor, zero], like=x, dtype=_NUMBERS[kind])
        return self.add("DequantizeLinear", [numbers, factor, zero], like=x)

    def a_scale_a_token(self, x: ir.Value) -> ir.Value:
        """As sana_ref.quantize_ops.round_dynamic."""
        largest = INT8_MAX if self.plan.format == "int8" else FP8_MAX
        assert x.shape is not None
        column = ir.Shape([*x.shape[:-1], 1])
        size = self.add("Abs", [x], like=x)
        axes = self.constant("last_axis", np.array([-1], np.int64))
        most = self.add("ReduceMax", [size, axes], {"keepdims": 1}, shape=column)
        scale = self.add("Div", [most, self.constant("largest", np.array(largest, np.float32))], shape=column)
        scale = self.add("Max", [scale, self.constant("least_scale", np.array(LEAST_SCALE, np.float32))], shape=column)
        scaled = self.add("Mul", [x, self.add("Reciprocal", [scale], shape=column)], like=x)
        if self.plan.format == "int8":
            low, high = (self.constant(f"limit_{sign}", np.array(sign * largest, np.float32)) for sign in (-1, 1))
            numbers = self.add("Clip", [self.add("Round", [scaled], like=x), low, high], like=x)
        else:
            narrow = self.add("Cast", [scaled], {"to": int(_NUMBERS["fp8"])}, like=x, dtype=_NUMBERS["fp8"])
            numbers = self.add("Cast", [narrow], {"to": int(ir.DataType.FLOAT)}, like=x)
        return self.add("Mul", [numbers, scale], like=x)

    def weight(self, names: Sequence[str]) -> ir.Value:
        """(columns, depth) of a product with the parameters `names`, dequantised."""
        kind = self.plan.format
        rows = slice(self.rows[names[0]].start, self.rows[names[-1]].stop)
        shape = (rows.stop - rows.start, self.depth)
        # a part's name begins with the group's, so that parameters of a group are asked for one after the other
        part = f"{self.name}.{names[0].split('.')[-2]}" if len(self.products) > 1 else None
        numbers = self.parameter("weight_numbers", _NUMBERS[kind], shape, lambda q: q.weight.numbers[rows], part)
        if kind == "nvfp4":
            blocks = (shape[0], self.depth // BLOCK)
            scale = self.parameter("weight_scale", ir.DataType.FLOAT, (), lambda q: q.weight.scale)
            block_scale = self.parameter("weight_block_scale", _NUMBERS["fp8"], blocks, lambda q: _rows(q.weight.block_scale, rows))
            real = self.add("DequantizeLinear", [block_scale, scale], shape=ir.Shape(blocks))
            return self.add("DequantizeLinear", [numbers, real], {"axis": -1, "block_size": BLOCK}, shape=ir.Shape(shape))
        if is_dynamic(self.plan):
            # DequantizeLinear by other words: ONNX Runtime fuses it with a product of fp32 activations (MatMulNBits), and quantises
            # those its own way, a block at a time.
            column = self.parameter("weight_scale", ir.DataType.FLOAT, (shape[0], 1), lambda q: q.weight.scale[rows, None], part)
            wide = self.add("Cast", [numbers], {"to": int(ir.DataType.FLOAT)}, shape=ir.Shape(shape))
            return self.add("Mul", [wide, column], shape=ir.Shape(shape))
        scale = self.parameter("weight_scale", ir.DataType.FLOAT, shape[:1], lambda q: q.weight.scale[rows], part)
        return self.add("DequantizeLinear", [numbers, scale], {"axis": 0}, shape=ir.Shape(shape))

    def add_low_rank(self, x: ir.Value, rank: int, narrow: ir.DataType | None) -> None:
        """Add x @ down^T @ up^T to the product, in the component's own type, summed in fp32."""
        dtype = narrow or ir.DataType.FLOAT
        down = self.parameter("low_rank_down", dtype, (rank, self.depth), lambda q: q.down)
        up = self.parameter("low_rank_up", dtype, (self.columns, rank), lambda q: q.up)
        assert x.shape is not None
        value = x
        for factor, width in ((down, rank), (up, self.columns)):
            value = self.through(value, narrow)
            shape = ir.Shape([*x.shape[:-1], width])
            value = self.add("MatMul", [value, self.transposed(self.through(factor, None))], shape=shape)
        value = self.through(value, narrow)
        product = self.node.outputs[0]
        users = list(product.uses())
        total = self.node_of("Add", [product, value], {}, product.shape, ir.DataType.FLOAT)
        self.graph.insert_after(self.node, total)
        for use in users:
            use.node.replace_input_with(use.idx, total.outputs[0])

    def through(self, value: ir.Value, narrow: ir.DataType | None) -> ir.Value:
        """The value rounded to a type, and in fp32 again."""
        if narrow is not None:
            value = self.add("Cast", [value], {"to": int(narrow)}, like=value, dtype=narrow)
        return value if value.dtype == ir.DataType.FLOAT else self.add("Cast", [value], {"to": int(ir.DataType.FLOAT)}, like=value)

    def transposed(self, value: ir.Value) -> ir.Value:
        assert value.shape is not None
        return self.add("Transpose", [value], {"perm": [1, 0]}, shape=ir.Shape([value.shape[1], value.shape[0]]))

    def parameter(
        self,
        suffix: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        field: Callable[[QuantizedLayer], Tensor | None],
        name: str | None = None,
    ) -> ir.Value:
        """An initializer that waits for its values, as the weights of the checkpoint do. name: None: the group's."""
        value = ir.Value(name=f"{name or self.name}.{suffix}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.weights.made[str(value.name)] = self.group, field
        self.graph.initializers[str(value.name)] = value
        return value

    def constant(self, suffix: str, array: Any) -> ir.Value:
        name = f"{self.name}.{suffix}"
        if name not in self.graph.initializers:
            tensor = ir.Tensor(array, name=name)
            self.graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self.graph.initializers[name]

    def add(
        self,
        op: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        shape: ir.Shape | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """A node before the product; its result has the shape of `like`, or `shape`."""
        node = self.node_of(op, inputs, attributes or {}, like.shape if like is not None else shape, dtype)
        return self.insert(node).outputs[0]

    def insert(self, node: ir.Node) -> ir.Node:
        self.graph.insert_before(self.node, node)
        return node

    def node_of(
        self, op: str, inputs: list[ir.Value], attributes: Mapping[str, Any], shape: ir.Shape | None, dtype: ir.DataType
    ) -> ir.Node:
        self._added += 1
        node = ir.node(op, inputs, dict(attributes), name=f"{self.name}.{op}_{self._added}")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = node.name, shape, ir.TensorType(dtype)
        return node
