"""How PyTorch operators that need care become ONNX nodes.

- `sana::*` custom ops stay single nodes of domain `sana`: TensorRT meets them as plugins, everything else runs their function body.
- Scaled dot-product attention: the exporter's own rule splits the scale over q and k, reshapes k through computed shapes, and
  rounds twice; ours is the textbook form that TensorRT recognises and fuses.
- The size of a dimension is taken with Gather: TensorRT-RTX 1.6 refuses the Squeeze that the exporter would write.
- Frequencies of sinusoids (`exp`, `theta ** x` of constants) are folded, in fp64 and rounded once: NumPy's fp32 exp is off by two
  units in the last place, which a timestep of 1000 turns into 1e-4 radians.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import values
from onnxscript.onnx_opset import opset23 as op

from plugins import (
    causal_attention,
    conv3x3,
    conv3x3_upsample,
    conv_taps,
    cross_attention,
    gated_depthwise_conv,
    modulated_norm,
    multiscale_projection,
    normed_sum,
    qkv_linear_attention,
    relu_linear_attention,
)

__all__ = ["OPSET", "SANA_DOMAIN", "translation_table"]

OPSET = 23  # from 22 on Conv takes bf16
SANA_DOMAIN = "sana"
_DOUBLE = onnx.TensorProto.DOUBLE
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _type(tensor: str) -> str:
    return "tensor(float)" if tensor in ("state", "cos", "sin", "taps") else "T"


def _sana_op(name: str, inputs: tuple[str, ...], attributes: dict[str, OpSchema.AttrType], *outputs: str) -> values.Op:
    """An operator of domain `sana`, with one output unless named; all tensors of one floating type but those that are fp32."""
    schema = OpSchema(
        name,
        SANA_DOMAIN,
        1,
        type_constraints=[("T", _FLOATS, "floating point")],
        inputs=[OpSchema.FormalParameter(each, _type(each)) for each in inputs],
        outputs=[OpSchema.FormalParameter(each, _type(each)) for each in outputs or ("out",)],
        attributes=[OpSchema.Attribute(each, kind, "") for each, kind in attributes.items()],
    )
    return values.Op(values.Opset(SANA_DOMAIN, 1), name, schema)


_RELU_LINEAR_ATTENTION = _sana_op(relu_linear_attention.OP, ("q", "k", "v"), {"eps": OpSchema.AttrType.FLOAT})


def _relu_linear_attention(q: Any, k: Any, v: Any, eps: float = 1e-15) -> Any:
    return _RELU_LINEAR_ATTENTION(q, k, v, eps=eps)


_CROSS_ATTENTION = _sana_op(cross_attention.OP, ("q", "keys", "values", "bias"), {"block": OpSchema.AttrType.INT})


def _cross_attention(q: Any, keys: Any, values: Any, bias: Any, block: int) -> Any:
    return _CROSS_ATTENTION(q, keys, values, bias, block=block)


_LAYOUT = {"shape": OpSchema.AttrType.INTS, "in_qkv": OpSchema.AttrType.INTS}
_ROTATE = _sana_op(causal_attention.ROTATE, causal_attention.INPUTS[causal_attention.ROTATE], _LAYOUT, "turned")
_ATTEND = _sana_op(
    causal_attention.ATTEND,
    causal_attention.INPUTS[causal_attention.ATTEND],
    _LAYOUT
    | dict.fromkeys(("in_turned", "grouped"), OpSchema.AttrType.INTS)
    | dict.fromkeys(("scale", "cap"), OpSchema.AttrType.FLOAT)
    | {"window": OpSchema.AttrType.INT},
)


def _causal_attention(
    qkv: Any,
    cos: Any,
    sin: Any,
    live: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cap: float,
    window: int | None = None,
) -> Any:
    layout = causal_attention.layout(num_heads, num_kv_heads, qkv.shape[-1] // (num_heads + 2 * num_kv_heads))
    turned: Any = _ROTATE(qkv, cos, sin, **layout[causal_attention.ROTATE])
    window = causal_attention.ALL if window is None else window
    return _ATTEND(turned, qkv, live, **layout[causal_attention.ATTEND], scale=scale, cap=cap, window=window)


_GATED_DEPTHWISE_CONV = _sana_op(gated_depthwise_conv.OP, ("x", "weight", "bias"), {"channels": OpSchema.AttrType.INT})


def _gated_depthwise_conv(x: Any, weight: Any, bias: Any) -> Any:
    return _GATED_DEPTHWISE_CONV(x, weight, bias, channels=weight.shape[2])


_CONV3X3 = _sana_op(conv3x3.OP, ("x", "weight", "bias"), {"activation": OpSchema.AttrType.STRING})
_NORM_INPUTS = ("x", "weight", "residual", "norm_weight", "norm_bias")
_CONV3X3_NORM = _sana_op(conv3x3.NORM, _NORM_INPUTS, {"eps": OpSchema.AttrType.FLOAT})


def _conv3x3(x: Any, weight: Any, bias: Any, activation: str = "none") -> Any:
    return _CONV3X3(x, weight, bias, activation=activation)


def _conv3x3_norm(x: Any, weight: Any, residual: Any, norm_weight: Any, norm_bias: Any, eps: float = conv3x3.EPS) -> Any:
    return _CONV3X3_NORM(x, weight, residual, norm_weight, norm_bias, eps=eps)


_CONV3X3_UPSAMPLE = _sana_op(
    conv3x3_upsample.OP, conv3x3_upsample.INPUTS, dict.fromkeys(("repeats", "nearest"), OpSchema.AttrType.INT)
)


def _conv3x3_upsample(x: Any, weight: Any, bias: Any, repeats: int = 0, nearest: bool = False) -> Any:
    return _CONV3X3_UPSAMPLE(x, weight, bias, repeats=repeats, nearest=int(nearest))


_TAPS = _sana_op(conv_taps.OP, conv_taps.INPUTS[conv_taps.OP], {"eps": OpSchema.AttrType.FLOAT}, "taps")
_TAP_SUM = _sana_op(conv_taps.SUM, conv_taps.INPUTS[conv_taps.SUM], {"channels": OpSchema.AttrType.INT})


def _normed_taps(x: Any, norm_weight: Any, norm_bias: Any, weight: Any, eps: float = conv3x3.EPS) -> Any:
    return _TAPS(x, norm_weight, norm_bias, weight, eps=eps)


def _tap_sum(taps: Any, bias: Any) -> Any:
    return _TAP_SUM(taps, bias, channels=bias.shape[0])


_MULTISCALE_PROJECTION = _sana_op(
    multiscale_projection.OP, multiscale_projection.INPUTS, dict.fromkeys(("channels", "heads"), OpSchema.AttrType.INT)
)


def _multiscale_projection(x: Any, near: Any, mix: Any) -> Any:
    return _MULTISCALE_PROJECTION(x, near, mix, **multiscale_projection.body_attributes(*mix.shape))


_SPLIT = {"split": OpSchema.AttrType.INTS, "axis": OpSchema.AttrType.INT}
_STATE = _sana_op(qkv_linear_attention.STATE, ("qkv",), _SPLIT, "state")
_APPLY = _sana_op(qkv_linear_attention.APPLY, ("qkv", "state"), _SPLIT | {"eps": OpSchema.AttrType.FLOAT})


def _qkv_linear_attention(qkv: Any, num_heads: int, eps: float = 1e-15, interleaved: bool = False) -> Any:
    layout = qkv_linear_attention.layout(num_heads, qkv.shape[-1] // (3 * num_heads), interleaved=interleaved)
    state: Any = _STATE(qkv, **layout)
    return _APPLY(qkv, state, **layout, eps=eps)


_NORM_ATTRIBUTES = {"rows": OpSchema.AttrType.INTS, "rms": OpSchema.AttrType.INT, "eps": OpSchema.AttrType.FLOAT}
_NORMS = {name: _sana_op(name, inputs, _NORM_ATTRIBUTES, "hidden", "normed") for name, inputs in modulated_norm.INPUTS.items()}


def _modulated_norm(
    x: Any, branch: Any, time: Any, table: Any, gate_time: Any, gate_table: Any, rows: Any, rms: bool, eps: float
) -> Any:
    attributes = {"rows": list(rows), "rms": int(rms), "eps": eps}
    if gate_time is None:
        return _NORMS[modulated_norm.PLAIN](x, branch, time, table, **attributes)
    return _NORMS[modulated_norm.GATED](x, branch, time, table, gate_time, gate_table, **attributes)


_NORMED_SUM = _sana_op(normed_sum.OP, normed_sum.INPUTS, {"eps": OpSchema.AttrType.FLOAT}, "hidden", "normed")


def _normed_sum(x: Any, branch: Any, branch_weight: Any, weight: Any, eps: float) -> Any:
    return _NORMED_SUM(x, branch, branch_weight, weight, eps=eps)


def _scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k^T scale + mask) v. q: (B, H, N, D), k and v: (B, H, L, D), mask additive, broadcast to (B, H, N, L)."""
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(
            f"attention: got {dropout_p=}, {is_causal=}, {enable_gqa=}; expected none of them: only a mask is exported"
        )
    head_dim = query.shape[-1]
    factor = head_dim**-0.5 if scale is None else scale
    number: Any = op.Constant(value_float=factor)
    scaled = op.Mul(query, op.Cast(number, to=query.dtype.value))  # exact in the end: export.scalars
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _folded_exp(x: Any) -> Any:
    wide: Any = op.Cast(x, to=_DOUBLE)
    return op.Cast(op.Exp(wide), to=x.dtype.value)


def _folded_power(base: float, exponent: Any) -> Any:
    wide: Any = op.Constant(value=onnx.helper.make_tensor("base", _DOUBLE, [], [base]))
    wide_exponent: Any = op.Cast(exponent, to=_DOUBLE)
    return op.Cast(op.Pow(wide, wide_exponent), to=exponent.dtype.value)


def _size(x: Any, dim: int) -> Any:
    index: Any = op.Constant(value_int=dim)
    return op.Gather(op.Shape(x), index)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table for `torch.onnx.export(custom_translation_table=...)`. Importing sana_ref's ops registers them."""
    import sana_ref.attention_ops
    import sana_ref.conv_ops
    import sana_ref.gated_conv_ops
    import sana_ref.norm_ops
    import sana_ref.ops
    import sana_ref.tap_ops  # noqa: F401

    assert onnx.defs.onnx_opset_version() >= OPSET
    return {
        torch.ops.sana.causal_attention.default: _causal_attention,
        torch.ops.sana.conv3x3.default: _conv3x3,
        torch.ops.sana.conv3x3_norm.default: _conv3x3_norm,
        torch.ops.sana.conv3x3_upsample.default: _conv3x3_upsample,
        torch.ops.sana.cross_attention.default: _cross_attention,
        torch.ops.sana.gated_depthwise_conv.default: _gated_depthwise_conv,
        torch.ops.sana.modulated_norm.default: _modulated_norm,
        torch.ops.sana.multiscale_projection.default: _multiscale_projection,
        torch.ops.sana.normed_sum.default: _normed_sum,
        torch.ops.sana.normed_taps.default: _normed_taps,
        torch.ops.sana.qkv_linear_attention.default: _qkv_linear_attention,
        torch.ops.sana.relu_linear_attention.default: _relu_linear_attention,
        torch.ops.sana.tap_sum.default: _tap_sum,
        torch.ops.aten.scaled_dot_product_attention.default: _scaled_dot_product_attention,
        torch.ops.aten.exp.default: _folded_exp,
        torch.ops.aten.pow.Scalar: _folded_power,
        torch.ops.aten.sym_size.int: _size,
    }
