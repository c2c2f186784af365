"""NVFP4 in the portable graph: ONNX Runtime has no FP4, so standard operators compute what TensorRT's nodes mean.

Weights stay the same bytes of the same file, read as uint8: two numbers each, which a table turns into reals. Activations are
rounded to the numbers of e2m1 and stay fp32. Both are functions of the file, so a graph is as short as TensorRT's.
The numbers are those of sana_ref/quantize_ops.py.
"""

import onnx
import onnx_ir as ir
from onnx import parser

from engines.errors import BuildError
from sana_ref.fp8 import LEAST_SCALE
from sana_ref.quantize_ops import BLOCK, E2M1, FP4_MAX, FP8_MAX

__all__ = ["ROUND", "WEIGHT", "function_body", "without_fp4"]

ROUND, WEIGHT = "Nvfp4Round", "Nvfp4Weight"
_DOMAIN, _DYNAMIC = "sana", "TRT_FP4DynamicQuantize"
_FLOAT, _FP8, _INT32 = (int(kind) for kind in (ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT32))


def without_fp4(model: ir.Model) -> None:
    """Replace, in place, TensorRT's dynamic quantisation and every DequantizeLinear of FP4. Weights have to be bound to a file."""
    graph = model.graph
    for node in list(graph):
        numbers = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if numbers is None or numbers.dtype != ir.DataType.FLOAT4E2M1:
            continue
        block_scale, scale = _scales(node)
        maker = numbers.producer()
        if maker is None:
            replacement = ir.node(WEIGHT, [_as_bytes(graph, numbers), block_scale, scale], domain=_DOMAIN, name=node.name)
        elif maker.op_type == _DYNAMIC:
            replacement = ir.node(ROUND, [maker.inputs[0], scale], domain=_DOMAIN, name=node.name)
        else:
            raise BuildError(f"fp4: got numbers of a {maker.op_type}; expected a weight, or {_DYNAMIC}.")
        old, new = node.outputs[0], replacement.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(node, replacement)
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        name = old.name
        graph.remove(node, safe=True)
        new.name = name
    for node in reversed(list(graph)):
        if node.op_type in (_DYNAMIC, "DequantizeLinear") and not any(value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if value.dtype == ir.DataType.FLOAT4E2M1]:
        del graph.initializers[name]
    model.opset_imports.pop("trt", None)


def _scales(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Block scales and the scale of them, behind the second input of a DequantizeLinear of FP4."""
    assert node.inputs[1] is not None
    inner = node.inputs[1].producer()
    if inner is None or inner.op_type != "DequantizeLinear" or inner.inputs[0] is None or inner.inputs[1] is None:
        raise BuildError(f"fp4: got {node.name!r} with scales that are not dequantised themselves; expected block scales in FP8.")
    return inner.inputs[0], inner.inputs[1]


def _as_bytes(graph: ir.Graph, numbers: ir.Value) -> ir.Value:
    """The same place in the same file, as uint8 (columns, depth / 2)."""
    stored = numbers.const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert numbers.shape is not None
    name = f"{numbers.name}_packed"
    columns, depth = numbers.shape.numpy()
    shape = ir.Shape((columns, depth // 2))
    packed = ir.ExternalTensor(
        stored.location, stored.offset, stored.length, ir.DataType.UINT8, shape=shape, name=name, base_dir=stored.base_dir
    )
    graph.initializers[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape, const_value=packed)
    return graph.initializers[name]


def function_body(op: str, opset: int) -> onnx.FunctionProto:
    """WEIGHT: packed uint8 (C, D / 2), block scales e4m3 (C, D / 16), scale fp32 () -> fp32 (C, D).
    ROUND: x fp32 (…, D), scale fp32 () -> fp32 (…, D)."""
    header = f'<domain: "{_DOMAIN}", opset_import: ["" : {opset}]>'
    table = ", ".join(str(number) for number in (*E2M1, *(-number for number in E2M1)))
    if op == WEIGHT:
        text = f"""
        {header}
        {WEIGHT} (packed, block_scale, scale) => (real)
        {{
            fifteen = Constant <value = uint8 {{15}}> ()
            four = Constant <value = uint8 {{4}}> ()
            last = Constant <value_ints = [-1]> ()
            low = BitwiseAnd (packed, fifteen)
            high = BitShift <direction = "RIGHT"> (packed, four)
            low_pair = Unsqueeze (low, last)
            high_pair = Unsqueeze (high, last)
            pairs = Concat <axis = -1> (low_pair, high_pair)
            blocks = Constant <value_ints = [0, -1, {BLOCK}]> ()
            bits = Reshape (pairs, blocks)
            index = Cast <to = {_INT32}> (bits)
            table = Constant <value_floats = [{table}]> ()
            numbers = Gather <axis = 0> (table, index)
            wide = Cast <to = {_FLOAT}> (block_scale)
            scales = Mul (wide, scale)
            column = Unsqueeze (scales, last)
            product = Mul (numbers, column)
            flat = Constant <value_ints = [0, -1]> ()
            real = Reshape (product, flat)
        }}"""
    else:
        text = f"""
        {header}
        {ROUND} (x, scale) => (rounded)
        {{
            shape = Shape (x)
            leading = Shape <start = 0, end = -1> (x)
            block = Constant <value_ints = [-1, {BLOCK}]> ()
            blocked = Concat <axis = 0> (leading, block)
            blocks = Reshape (x, blocked)
            size = Abs (blocks)
            last = Constant <value_ints = [-1]> ()
            most = ReduceMax <keepdims = 1> (size, last)
            six = Constant <value_float = {FP4_MAX}> ()
            minus_six = Neg (six)
            largest = Constant <value_float = {FP8_MAX}> ()
            least = Constant <value_float = {LEAST_SCALE!r}> ()
            sixth = Div (most, six)
            ratio = Div (sixth, scale)
            limited = Min (ratio, largest)
            bits = Cast <to = {_FP8}> (limited)
            block_scale = Cast <to = {_FLOAT}> (bits)
            real_scale = Mul (block_scale, scale)
            divisor = Max (real_scale, least)
            scaled = Div (blocks, divisor)
            clipped = Clip (scaled, minus_six, six)
            clipped_size = Abs (clipped)
            two = Constant <value_float = 2.0> ()
            four = Constant <value_float = 4.0> ()
            half = Constant <value_float = 0.5> ()
            one = Constant <value_float = 1.0> ()
            below_two = Less (clipped_size, two)
            below_four = Less (clipped_size, four)
            upper = Where (below_four, one, two)
            step = Where (below_two, half, upper)
            steps = Div (clipped, step)
            whole = Round (steps)
            numbers = Mul (whole, step)
            product = Mul (numbers, real_scale)
            rounded = Reshape (product, shape)
        }}"""
    return parser.parse_function(text)
