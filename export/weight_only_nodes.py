"""Weights in 4 or 8 bits in a graph: each is replaced by numbers, scales and a DequantizeLinear, and all that reads it stays.

In TensorRT's graph the scales have the component's type, so the result has it too; a product, or a Gather of a table, takes the
DequantizeLinear in, and the engine holds the numbers. Tables are dequantised before the Gather: TensorRT refuses it the other way.

In the portable graph DequantizeLinear is fp32, and its result is rounded to the component's type and back, so that both graphs have
the same weights. A table is looked up before it is dequantised, or each text would dequantise 256,000 rows; ONNX Runtime gathers
neither FP8 nor INT4, so those are read as bytes of the same file (as export/fp4_nodes.py does).
The numbers are those of sana_ref/weight_only.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
import torch
from onnx import parser
from torch import Tensor

from engines.errors import BuildError
from sana_ref.weight_only import INT4_LEAST, INT4_MAX, PackedWeight, WeightFormat, block_of, pack_weight

__all__ = ["ROWS", "dequantized", "function_body", "pack_graph", "portable_tables", "rounded"]

Load = Callable[[str], Tensor]
ROWS: dict[WeightFormat, str] = {"int4": "Int4Rows", "int8": "Int8Rows", "fp8": "Fp8Rows"}
_NUMBERS = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_KIND: dict[ir.DataType, WeightFormat] = {
    ir.DataType.INT4: "int4",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_DOMAIN = "sana"
_FLOAT, _INT32 = int(ir.DataType.FLOAT), int(ir.DataType.INT32)


def dequantized(load: Load, kinds: Mapping[str, WeightFormat], dtype: torch.dtype) -> Load:
    """`load`, with what a network computes with whose weights `kinds` are stored in those formats."""
    return lambda name: pack_weight(load(name), kinds[name], name, dtype).real() if name in kinds else load(name)


def pack_graph(
    model: ir.Model, load: Load, kinds: Mapping[str, WeightFormat], dtype: torch.dtype, seen: Callable[..., None]
) -> Load:
    """Rewrite, in place, the weights that `kinds` has in a graph whose parameters have no values yet.

    load: name -> tensor as the checkpoint stores it. dtype: of the component, and so of scales. seen: called with the name, the
    weight and its PackedWeight when that is made. Returns `load` for the rewritten graph, which makes a weight when its numbers or
    scales are asked for, and holds one. Raises BuildError for a name that the graph has not.
    """
    graph = model.graph
    made: dict[str, tuple[str, str]] = {}
    for name, kind in kinds.items():
        weight = graph.initializers.get(name)
        if weight is None or weight.shape is None or weight.dtype is None:
            raise BuildError(f"weights: got no parameter {name!r} of known shape in the graph; expected it.")
        columns, depth = weight.shape.numpy()
        block = block_of(depth, name) if kind == "int4" else depth
        scales = (columns, depth // block) if kind == "int4" else (columns,)
        numbers = _parameter(graph, f"{name}.numbers", _NUMBERS[kind], (columns, depth))
        scale = _parameter(graph, f"{name}.scale", weight.dtype, scales)
        attributes = {"axis": 1, "block_size": block} if kind == "int4" else {"axis": 0}
        node = ir.node("DequantizeLinear", [numbers, scale], attributes, name=f"{name}.dequantize")
        node.outputs[0].name = f"{name}.real"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(weight.dtype), weight.shape
        for user, index in list(weight.uses()):
            user.replace_input_with(index, node.outputs[0])
        graph.insert_before(graph[0], node)
        del graph.initializers[name]
        made |= {f"{name}.numbers": (name, "numbers"), f"{name}.scale": (name, "scale")}
    held: tuple[str, PackedWeight] | None = None

    def asked(parameter: str) -> Tensor:
        nonlocal held
        if parameter not in made:
            return load(parameter)
        name, part = made[parameter]
        if held is None or held[0] != name:
            weight = load(name)
            held = name, pack_weight(weight, kinds[name], name, dtype)
            seen(name, weight, held[1])
        return held[1].numbers if part == "numbers" else held[1].scale

    return asked


def _parameter(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    graph.initializers[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    return graph.initializers[name]


def portable_tables(model: ir.Model) -> list[tuple[ir.Value, ir.DataType]]:
    """Replace, in place, each Gather of dequantised rows by one of their numbers. Weights have to be bound to a file.

    Returns the dequantised values of the graph and the type that each is rounded to: `rounded` does that, once all is fp32.
    """
    graph = model.graph
    found = []
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].producer() is not None:
            continue
        value = node.outputs[0]
        if value.dtype not in _HALF:
            continue
        for lookup, index in list(value.uses()):
            if lookup.op_type == "Gather" and index == 0:
                found.append((_rows(graph, node, lookup), value.dtype))
        if value.uses():
            found.append((value, value.dtype))
        else:
            graph.remove(node, safe=True)
    return found


def _rows(graph: ir.Graph, dequantize: ir.Node, lookup: ir.Node) -> ir.Value:
    numbers, scale = dequantize.inputs
    assert numbers is not None
    assert numbers.dtype is not None
    kind = _KIND[numbers.dtype]
    stored = numbers if kind == "int8" else _as_bytes(graph, numbers)
    node = ir.node(ROWS[kind], [stored, scale, lookup.inputs[1]], domain=_DOMAIN, name=lookup.name)
    old, new = lookup.outputs[0], node.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(lookup, node)
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    name = old.name
    graph.remove(lookup, safe=True)
    new.name = name
    if stored is not numbers and len(list(numbers.uses())) == 1:  # the DequantizeLinear's, which goes
        del graph.initializers[str(numbers.name)]
    return new


def _as_bytes(graph: ir.Graph, numbers: ir.Value) -> ir.Value:
    """The same place in the same file, as uint8: (rows, depth) of FP8, (rows, depth / 2) of INT4."""
    stored = numbers.const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert numbers.shape is not None
    name = f"{numbers.name}_bytes"
    rows, depth = numbers.shape.numpy()
    shape = ir.Shape((rows, depth if numbers.dtype == ir.DataType.FLOAT8E4M3FN else depth // 2))
    tensor = ir.ExternalTensor(
        stored.location, stored.offset, stored.length, ir.DataType.UINT8, shape=shape, name=name, base_dir=stored.base_dir
    )
    graph.initializers[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape, const_value=tensor)
    return graph.initializers[name]


def rounded(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Let all that reads `value`, fp32, read what is left of it in `dtype`."""
    users = list(value.uses())
    after = value.producer()
    assert after is not None
    for kind, suffix in ((dtype, "narrow"), (ir.DataType.FLOAT, "rounded")):
        cast = ir.node("Cast", [value], {"to": kind}, name=f"{value.name}_{suffix}")
        cast.outputs[0].name = cast.name
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(kind), value.shape
        graph.insert_after(after, cast)
        after, value = cast, cast.outputs[0]
    for user, index in users:
        user.replace_input_with(index, value)


def function_body(kind: WeightFormat, opset: int) -> onnx.FunctionProto:
    """numbers (rows, depth) int8, bytes of FP8, or pairs of INT4 (rows, depth / 2); scale fp32 (rows,), INT4 (rows, blocks);
    ids int64 (…) -> fp32 (…, depth)."""
    head = f'<domain: "{_DOMAIN}", opset_import: ["" : {opset}]>\n{ROWS[kind]} (numbers, scale, ids) => (real)'
    common = """
        row = Gather <axis = 0> (numbers, ids)
        factor = Gather <axis = 0> (scale, ids)
        last = Constant <value_ints = [-1]> ()
        column = Unsqueeze (factor, last)"""
    if kind == "int8":
        body = f"""
        wide = Cast <to = {_FLOAT}> (row)
        real = Mul (wide, column)"""
    elif kind == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)  # a weight has no NaN
        body = f"""
        index = Cast <to = {_INT32}> (row)
        table = Constant <value_floats = [{", ".join(map(repr, every.tolist()))}]> ()
        wide = Gather <axis = 0> (table, index)
        real = Mul (wide, column)"""
    else:
        every_int4 = [*range(INT4_MAX + 1), *range(INT4_LEAST, 0)]
        body = f"""
        fifteen = Constant <value = uint8 {{15}}> ()
        four = Constant <value = uint8 {{4}}> ()
        low = BitwiseAnd (row, fifteen)
        high = BitShift <direction = "RIGHT"> (row, four)
        low_pair = Unsqueeze (low, last)
        high_pair = Unsqueeze (high, last)
        pairs = Concat <axis = -1> (low_pair, high_pair)
        index = Cast <to = {_INT32}> (pairs)
        table = Constant <value_floats = [{", ".join(f"{number}.0" for number in every_int4)}]> ()
        wide = Gather <axis = 0> (table, index)
        leading = Shape (factor)
        blocked = Concat <axis = 0> (leading, last)
        blocks = Reshape (wide, blocked)
        product = Mul (blocks, column)
        places = Shape (ids)
        flat = Concat <axis = 0> (places, last)
        real = Reshape (product, flat)"""
    return parser.parse_function(f"{head}\n{{{common}{body}\n}}")
