"""Outputs as bits of FP8 with a scale that is known before: what kernels share that see only a part of a row's channels.

Such a kernel cannot find a row's largest number, as plugins/fp8_quantize.py does. A build that has calibrated a scale for what
reads the output gives it to the node as `out_scale` (export/fp8_nodes.py). The node then has two outputs, as Fp8Quantize has:

    bits (…, D) int8, those of e4m3(out / out_scale), cut to ±448;  scales (…) fp32, out_scale for each row

Numbers are not rounded to the op's own type before. The kernel has parameters out_scales, behind out, and out_scale, behind its
other numbers; without a scale both are None, and are no parameters of the cubin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plugins.fp8_quantize import check_target
from plugins.launch import Expression, Output

if TYPE_CHECKING:
    import torch

    Quantized = tuple[torch.Tensor, float]  # scales to write, the scale

__all__ = ["OUT_SCALE", "check_outputs", "output_kinds", "quantized_outputs"]

OUT_SCALE = "out_scale"  # the attribute


def check_outputs(op: str, out: "torch.Tensor", quantized: "Quantized | None") -> None:
    """Raises ValueError for bits and scales of other types or shapes than the module's docstring has."""
    if quantized is None:
        return
    scales, scale = quantized
    kinds = [str(out.dtype), tuple(scales.shape), str(scales.dtype), scales.is_contiguous(), scales.device]
    if kinds != ["torch.int8", tuple(out.shape[:-1]), "torch.float32", True, out.device] or not scale > 0:
        raise ValueError(
            f"{op}: got bits {tuple(out.shape)} {out.dtype}, scales {tuple(scales.shape)} {scales.dtype}, scale {scale}; expected "
            "(…, D) int8 and (…) fp32, contiguous, on one device, and a number above 0"
        )


def output_kinds(op: str, capability: int, dtype: str, quantized: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Triton's types of out, out_scales and out_scale; and those of them that are None. Raises ValueError for an SM without fp8."""
    if quantized:
        check_target(op, capability)
        return {"out": "*i8", "out_scales": "*fp32", "out_scale": "fp32"}, {}
    absent = ("out_scales", "out_scale")
    return {"out": f"*{dtype}"} | dict.fromkeys(absent, "constexpr"), dict.fromkeys(absent)


def quantized_outputs(
    dtype: str, rows: Sequence[Expression], dim: int, out_scale: float | None
) -> tuple[list[Output], list[list[Any]], list[list[Any]]]:
    """Of a node: its outputs; arguments in place of out; and arguments behind the other numbers. rows: the shape before D."""
    if out_scale is None:
        return [Output(type=dtype, shape=[*rows, dim])], [["out", 0]], []
    outputs = [Output(type="int8", shape=[*rows, dim]), Output(type="fp32", shape=[*rows])]
    return outputs, [["out", 0], ["out", 1]], [["f32", out_scale]]
