"""Outputs as bits of FP8 or INT8 with a scale that is known before: what kernels share that see only a part of a row's channels.

Such a kernel cannot find a row's largest number, as plugins/fp8_quantize.py does. A build that has calibrated a scale for what
reads the output gives it to the node as `out_scale`, and where that is INT8 `out_kind`. The node then has these outputs:

    fp8     (export/fp8_nodes.py, as Fp8Quantize has them)
            bits (…, D) int8, those of e4m3(out / out_scale), cut to ±448;  scales (…) fp32, out_scale for each row
    int8    (export/int8_nodes.py)
            numbers (…, D) int8, out / out_scale to the nearest, of two the even one, cut to -128 and 127, as QuantizeLinear does

Numbers are not rounded to the op's own type before. The kernel has parameters out_scales, behind out, and out_scale, behind its
other numbers; without a scale both are None, for INT8 out_scales is, and what is None is no parameter of the cubin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins.eight_bits import Kind, bits_of, check_target
from plugins.launch import Expression, Output

if TYPE_CHECKING:
    import torch

    Quantized = tuple[torch.Tensor | None, float]  # scales to write, None for INT8; the scale

__all__ = ["OUT_KIND", "OUT_SCALE", "check_outputs", "output_kinds", "quantized_outputs", "static_bits"]

OUT_SCALE, OUT_KIND = "out_scale", "out_kind"  # the attributes
LEAST = tl.constexpr(-128.0)  # of INT8


@triton.jit
def static_bits(x, out_scales):
    """Bits, int8, of x in fp32, which was divided by the scale; of INT8 where out_scales is None. INT8's NaN becomes -128."""
    if out_scales is None:
        return bits_of(x, "int8", LEAST)
    else:
        return bits_of(x, "fp8")


def check_outputs(op: str, out: "torch.Tensor", quantized: "Quantized | None") -> None:
    """Raises ValueError for bits and scales of other types or shapes than the module's docstring has."""
    if quantized is None:
        return
    scales, scale = quantized
    kinds = [str(out.dtype)]
    expected: list[Any] = ["torch.int8"]
    if scales is not None:
        kinds += [tuple(scales.shape), str(scales.dtype), scales.is_contiguous(), scales.device]
        expected += [tuple(out.shape[:-1]), "torch.float32", True, out.device]
    if kinds != expected or not scale > 0:
        seen = "none" if scales is None else f"{tuple(scales.shape)} {scales.dtype}"
        raise ValueError(
            f"{op}: got bits {tuple(out.shape)} {out.dtype}, scales {seen}, scale {scale}; expected (…, D) int8 and (…) fp32, "
            "contiguous, on one device, and a number above 0"
        )


def output_kinds(op: str, capability: int, dtype: str, kind: Kind | None) -> tuple[dict[str, str], dict[str, None]]:
    """Triton's types of out, out_scales and out_scale; and those of them that are None. Raises ValueError for an SM without fp8."""
    given = {None: (), "int8": ("out_scale",), "fp8": ("out_scales", "out_scale")}[kind]
    if kind is not None:
        check_target(kind, op, capability)
    absent = [name for name in ("out_scales", "out_scale") if name not in given]
    types = {"out": f"*{dtype}" if kind is None else "*i8", "out_scales": "*fp32", "out_scale": "fp32"}
    return types | dict.fromkeys(absent, "constexpr"), dict.fromkeys(absent)


def quantized_outputs(
    dtype: str, rows: Sequence[Expression], dim: int, out_scale: float | None, kind: Kind | None
) -> tuple[list[Output], list[list[Any]], list[list[Any]]]:
    """Of a node: its outputs; arguments in place of out; and arguments behind the other numbers. rows: the shape before D."""
    outputs = [Output(type=dtype if kind is None else "int8", shape=[*rows, dim])]
    if kind == "fp8":
        outputs.append(Output(type="fp32", shape=[*rows]))
    return outputs, [["out", index] for index in range(len(outputs))], [] if kind is None else [["f32", out_scale]]
