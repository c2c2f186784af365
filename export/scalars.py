"""Python numbers in 16-bit arithmetic, as PyTorch means them.

`x * 19.6` with a bf16 `x` is computed in fp32 and rounded once. The exporter rounds 19.6 to bf16 (19.625) and multiplies in bf16:
an error of the same sign everywhere, which parity would see as a bias. Where rounding changes the number, the operation is widened.
"""

import numpy as np
import onnx_ir as ir

__all__ = ["keep_scalars_exact"]

_OPERATIONS = frozenset({"Add", "Sub", "Mul", "Div"})
_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def keep_scalars_exact(model: ir.Model) -> None:
    """Rewrite, in place, each elementwise operation on a 16-bit tensor and a number that 16 bits do not hold."""
    for node in list(model.graph):
        if node.op_type in _OPERATIONS and node.outputs[0].dtype in _HALF:
            numbers = [_rounded_number(value) for value in node.inputs]
            for index, number in enumerate(numbers):
                if number is not None:
                    _widen(model.graph, node, index, number)
                    break


def _rounded_number(value: ir.Value | None) -> float | None:
    """The number, if `value` is a scalar constant that loses digits in a cast to 16 bits."""
    cast = value.producer() if value is not None else None
    if cast is None or cast.op_type != "Cast" or ir.DataType(cast.attributes["to"].as_int()) not in _HALF:
        return None
    constant = ir.convenience.get_const_tensor(cast.inputs[0]) if cast.inputs[0] is not None else None
    if constant is None or constant.size != 1:
        return None
    number = np.asarray(constant.numpy(), np.float64).reshape(())
    half = ir.DataType(cast.attributes["to"].as_int()).numpy()
    return float(number) if number != number.astype(half).astype(np.float64) else None


def _widen(graph: ir.Graph, node: ir.Node, index: int, number: float) -> None:
    """node(x, number) becomes Cast(node(Cast(x), number)), with fp32 in between. index: which input the number is."""
    result = node.outputs[0]
    other = node.inputs[1 - index]
    assert other is not None
    assert result.name is not None
    assert result.dtype is not None
    wide_in = ir.node("Cast", [other], {"to": ir.DataType.FLOAT}, name=f"{result.name}_in")
    constant = ir.node("Constant", [], {"value": ir.tensor(np.float32(number))}, name=f"{result.name}_number")
    operands = [wide_in.outputs[0], constant.outputs[0]]
    wide = ir.node(node.op_type, operands if index == 1 else operands[::-1], name=f"{result.name}_op")
    narrow = ir.node("Cast", [wide.outputs[0]], {"to": result.dtype}, name=node.name)
    for each, suffix in ((wide_in, "in"), (constant, "number"), (wide, "wide")):
        each.outputs[0].name = f"{result.name}_{suffix}"
        each.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    narrow.outputs[0].type, narrow.outputs[0].shape = result.type, result.shape
    graph.insert_before(node, [wide_in, constant, wide, narrow])
    ir.convenience.replace_all_uses_with(result, narrow.outputs[0])
    graph.remove(node, safe=True)
    narrow.outputs[0].name = result.name
