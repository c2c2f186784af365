"""Compiled kernels for the nodes of domain `sana`: what turns a graph that runs anywhere into one that TensorRT runs with plugins.

Only the graph that TensorRT compiles carries them. The cubins then travel inside the engine.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from engines.errors import BuildError
from engines.spec import Target
from export.translation import SANA_DOMAIN
from plugins import (
    causal_attention,
    conv3x3,
    conv3x3_quantized,
    conv3x3_upsample,
    conv_taps,
    cross_attention,
    fp8_quantize,
    gated_depthwise_conv,
    gated_sum,
    linear,
    modulated_norm,
    multiscale_projection,
    normed_sum,
    qkv_linear_attention,
    relu_linear_attention,
    static_quantize,
)
from plugins.static_scale import OUT_KIND, OUT_SCALE, OutKind

__all__ = ["add_cubins", "has_kernel"]

_TYPE_NAMES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def _out_scale(node: onnx.NodeProto) -> float | None:
    """What export/fp8_nodes.py, export/epilogue_nodes.py or export/quantized_conv_nodes.py gave the node."""
    return next((attribute.f for attribute in node.attribute if attribute.name == OUT_SCALE), None)


def _out_bits(node: onnx.NodeProto) -> dict[str, Any]:
    """The same, with its kind."""
    kind = next((attribute.s.decode() for attribute in node.attribute if attribute.name == OUT_KIND), "fp8")
    return {"out_scale": _out_scale(node), "out_kind": kind}


def _relu_linear_attention(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    q = type_of[node.input[0]]
    eps = next((a.f for a in node.attribute if a.name == "eps"), relu_linear_attention.EPS)
    head_dim = q.shape.dim[-1].dim_value
    return relu_linear_attention.compile_cubins(targets, _TYPE_NAMES[q.elem_type], head_dim, eps)


def _causal_attention(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    both, kv_heads = given["in_qkv"]
    dtype = _TYPE_NAMES[type_of[node.input[list(causal_attention.INPUTS[node.op_type]).index("qkv")]].elem_type]
    numbers = {name: given[name] for name in ("scale", "cap", "window") if name in given}
    return causal_attention.compile_cubins(node.op_type, targets, dtype, both - kv_heads, kv_heads, given["shape"][-1], **numbers)


def _cross_attention(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    keys = type_of[node.input[1]]
    heads, length, head_dim = (dim.dim_value for dim in keys.shape.dim[3:])
    (block,) = (attribute.i for attribute in node.attribute if attribute.name == "block")
    sizes = {"heads": heads, "n_keys": length, "head_dim": head_dim, "block": block}
    return cross_attention.compile_cubins(targets, _TYPE_NAMES[keys.elem_type], **sizes, **_out_bits(node))


def _gated_depthwise_conv(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x = type_of[node.input[0]]
    return gated_depthwise_conv.compile_cubins(targets, _TYPE_NAMES[x.elem_type], x.shape.dim[-1].dim_value, **_out_bits(node))


def _qkv_linear_attention(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    qkv = type_of[node.input[0]]
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    interleaved = given["axis"] == 3
    heads, head_dim = given["split"][2 if interleaved else 3], given["split"][4]
    eps = given.get("eps", qkv_linear_attention.EPS)
    dtype = _TYPE_NAMES[qkv.elem_type]
    options = {"interleaved": interleaved, **_out_bits(node)}
    return qkv_linear_attention.compile_cubins(node.op_type, targets, dtype, heads, head_dim, eps, **options)


def _conv3x3(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x, out = type_of[node.input[0]], type_of[node.output[0]]
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    channels, outputs = (tensor.shape.dim[-1].dim_value for tensor in (x, out))
    activation, eps = given.get("activation", b"none").decode(), given.get("eps", conv3x3.EPS)
    dtype = _TYPE_NAMES[x.elem_type]
    return conv3x3.compile_cubins(node.op_type, targets, dtype, channels, outputs, activation=activation, eps=eps)


def _conv3x3_upsample(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x, out = type_of[node.input[0]], type_of[node.output[0]]
    channels, outputs = (tensor.shape.dim[-1].dim_value for tensor in (x, out))
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    repeats, nearest = given.get("repeats", 0), bool(given.get("nearest", 0))
    return conv3x3_upsample.compile_cubins(targets, _TYPE_NAMES[x.elem_type], channels, outputs, repeats, nearest)


def _conv_taps(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    first, last = type_of[node.input[0]].shape, type_of[node.input[-1]]
    eps = next((attribute.f for attribute in node.attribute if attribute.name == "eps"), conv3x3.EPS)
    channels, outputs = 1, last.shape.dim[-1].dim_value
    if node.op_type == conv_taps.OP:  # of which the last is a weight (C, 9 N), not a vector of N
        channels, outputs = first.dim[-1].dim_value, outputs // 9
    return conv_taps.compile_cubins(node.op_type, targets, _TYPE_NAMES[last.elem_type], channels, outputs, eps=eps)


def _quantized_conv3x3(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x, last = type_of[node.input[0]], type_of[node.input[-1]]  # the last is a vector of as many as there are channels out
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    channels, outputs = (tensor.shape.dim[-1].dim_value for tensor in (x, last))
    options = {"activation": given.get("activation", b"none").decode(), "eps": given.get("eps", conv3x3.EPS)}
    dtype = _TYPE_NAMES[last.elem_type]
    return conv3x3_quantized.compile_cubins(node.op_type, targets, dtype, channels, outputs, **options, out_scale=_out_scale(node))


def _static_quantize(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x, scale = type_of[node.input[0]], helper.get_node_attr_value(node, "scale")
    dims = x.shape.dim
    kind = next(kind for kind, op in static_quantize.OP.items() if op == node.op_type)
    return static_quantize.compile_cubins(kind, targets, _TYPE_NAMES[x.elem_type], dims[-1].dim_value, len(dims), scale)


def _fp8_quantize(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x = type_of[node.input[0]]
    return fp8_quantize.compile_cubins(targets, _TYPE_NAMES[x.elem_type], x.shape.dim[-1].dim_value, len(x.shape.dim))


def _gated_sum(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    dim = type_of[node.input[0]].shape.dim[-1].dim_value
    rows = type_of[node.input[2]].shape.dim[-1].dim_value // dim  # of the time
    return gated_sum.compile_cubins(targets, dim, helper.get_node_attr_value(node, "row"), rows)


def _modulated_norm(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x = type_of[node.input[0]]
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    dim = x.shape.dim[-1].dim_value
    widths = [type_of[name].shape.dim[-1].dim_value for name in (node.input[2], node.input[-2])]  # of time and gate_time
    static = _out_bits(node)
    kind: OutKind | None = "fp8" if given.get("quantized") else None  # by export/fp8_nodes.py
    if static["out_scale"] is not None:
        kind = static["out_kind"]
    variant = modulated_norm.Variant(
        dim=dim,
        rows=tuple(given["rows"]),
        time_rows=widths[0] // dim,
        gate_time_rows=widths[1] // dim,
        rms=bool(given["rms"]),
        quantized=kind,
    )
    return modulated_norm.compile_cubins(targets, _TYPE_NAMES[x.elem_type], variant, given["eps"], static["out_scale"])


def _multiscale_projection(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x = type_of[node.input[0]]
    channels, heads = x.shape.dim[-1].dim_value, helper.get_node_attr_value(node, "heads")
    return multiscale_projection.compile_cubins(targets, _TYPE_NAMES[x.elem_type], channels, channels // heads)


def _normed_sum(node: onnx.NodeProto, type_of: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    x = type_of[node.input[0]]
    eps = helper.get_node_attr_value(node, "eps")
    return normed_sum.compile_cubins(targets, _TYPE_NAMES[x.elem_type], x.shape.dim[-1].dim_value, eps)


_ATTRIBUTES: dict[str, Callable[..., dict[str, Any]]] = {
    **dict.fromkeys((causal_attention.ATTEND, causal_attention.ROTATE), _causal_attention),
    conv3x3.NORM: _conv3x3,
    conv3x3.OP: _conv3x3,
    **dict.fromkeys(conv3x3_quantized.OPS, _quantized_conv3x3),
    conv3x3_upsample.OP: _conv3x3_upsample,
    **dict.fromkeys(conv_taps.INPUTS, _conv_taps),
    cross_attention.OP: _cross_attention,
    fp8_quantize.OP: _fp8_quantize,
    gated_sum.OP: _gated_sum,
    gated_depthwise_conv.OP: _gated_depthwise_conv,
    modulated_norm.GATED: _modulated_norm,
    modulated_norm.PLAIN: _modulated_norm,
    multiscale_projection.OP: _multiscale_projection,
    normed_sum.OP: _normed_sum,
    qkv_linear_attention.APPLY: _qkv_linear_attention,
    qkv_linear_attention.STATE: _qkv_linear_attention,
    relu_linear_attention.OP: _relu_linear_attention,
    **dict.fromkeys(static_quantize.OP.values(), _static_quantize),
}


def has_kernel(node: onnx.NodeProto) -> bool:
    """Of this project's ops, those that cuBLASLt computes have none."""
    return node.domain == SANA_DOMAIN and node.op_type not in (linear.OP, linear.FP8)


def add_cubins(model: onnx.ModelProto, targets: Iterable[Target]) -> int:
    """Give every node of domain `sana` in `model` its plugin attributes, in place. Returns how many there were.

    Raises BuildError for an op or a shape that has no kernel.
    """
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    type_of = {value.name: value.type.tensor_type for value in values}
    count = 0
    for node in model.graph.node:
        if not has_kernel(node):
            continue
        if node.op_type not in _ATTRIBUTES:
            raise BuildError(f"node {node.name!r}: got the op {node.op_type}; expected one of {', '.join(_ATTRIBUTES)}")
        try:
            attributes = _ATTRIBUTES[node.op_type](node, type_of, targets)
        except ValueError as error:
            raise BuildError(f"node {node.name!r}: no kernel. {error}") from None
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        count += 1
    return count
