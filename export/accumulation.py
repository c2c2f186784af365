"""Matrix products of fp16 tensors that are summed in fp32, as PyTorch sums them.

TensorRT sums an fp16 product in fp16, and at Sana-1.6B's widths that is five times PyTorch's error. Its way to ask for fp32 sums
is a cast to fp32 before the product and one back behind it, which it fuses into one fp16 GEMM that sums in fp32. The casts also
keep TensorRT for RTX 1.6 from a fused attention that is wrong on compute capability 9.0 at these widths (relative error 0.76).

A bias is added behind the second cast: between the casts, TensorRT would fuse it into a product of fp32 factors, and keep the
weights in fp32 for it. Of a block of Sana-1.6B that was 50 MB, a GB of the model, and no tensor core multiplied.
"""

import onnx_ir as ir

__all__ = ["accumulate_in_fp32", "widen_product"]

_PRODUCTS = frozenset({"MatMul", "Gemm"})


def accumulate_in_fp32(model: ir.Model) -> int:
    """Rewrite, in place, each matrix product of fp16 tensors. Returns how many there were."""
    products = [n for n in model.graph if n.op_type in _PRODUCTS and n.outputs[0].dtype == ir.DataType.FLOAT16]
    for node in products:
        widen_product(model.graph, node)
    return len(products)


def widen_product(graph: ir.Graph, node: ir.Node) -> None:
    """Put a product of 16-bit tensors between casts to fp32 and one back to their type."""
    result = node.outputs[0]
    assert result.name is not None
    assert result.dtype is not None
    dtype = result.dtype
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        node.resize_inputs(2)
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        cast = _cast(value, ir.DataType.FLOAT, f"{result.name}_in{index}")
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    narrow = _cast(result, dtype, f"{result.name}_narrow")
    added = [narrow]
    if bias is not None:
        added.append(ir.node("Add", [narrow.outputs[0], bias], name=f"{result.name}_biased"))
        added[-1].outputs[0].type, added[-1].outputs[0].shape = ir.TensorType(dtype), result.shape
    last = added[-1].outputs[0]
    for use in result.uses():
        if use.node is not narrow:
            use.node.replace_input_with(use.idx, last)
    for index, output in enumerate(graph.outputs):
        if output is result:
            graph.outputs[index] = last
    graph.insert_after(node, added)
    last.name, result.name = result.name, f"{result.name}_wide"
    result.type = ir.TensorType(ir.DataType.FLOAT)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node
