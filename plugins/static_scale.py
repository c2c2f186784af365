"""Outputs in 8 bits with a scale that is known before: what kernels share that see only a part of a row's channels.

Such a kernel cannot find a row's largest number, as plugins/fp8_quantize.py does. A build that has calibrated a scale for what
reads the output gives it to the node as `out_scale`, and what the output then is as `out_kind`:

    fp8     (export/fp8_nodes.py; unless told otherwise) two outputs, as Fp8Quantize has them
            bits (…, D) int8, those of e4m3(out / out_scale), cut to ±448;  scales (…) fp32, out_scale for each row
    int8    (export/epilogue_nodes.py) as QuantizeLinear has it
            (…, D) int8, out / out_scale to the nearest, of two the even one, cut to -128 and 127
    e4m3    (export/epilogue_nodes.py) as QuantizeLinear has it
            (…, D) of TensorRT's own FP8, e4m3(out / out_scale), cut to ±448

Numbers are not rounded to the op's own type before. The kernel has parameters out_scales, behind out, and out_scale, behind its
other numbers; without a scale both are None, out_scales is but for fp8, and what is None is no parameter of the cubin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import triton
import triton.language as tl

from plugins.eight_bits import bits_of, check_target
from plugins.launch import Expression, Output

if TYPE_CHECKING:
    import torch

    Quantized = tuple[torch.Tensor | None, float]  # scales to write, None but for fp8; the scale

__all__ = ["OUT_KIND", "OUT_SCALE", "OutKind", "as_output", "check_outputs", "output_kinds", "quantized_outputs"]

OutKind = Literal["fp8", "int8", "e4m3"]
OUT_SCALE, OUT_KIND = "out_scale", "out_kind"  # the attributes
LEAST = tl.constexpr(-128.0)  # of INT8


@triton.jit
def as_output(x, out, out_scales):
    """x in fp32, which was divided by the scale if there is one, as `out` holds it. INT8's NaN becomes -128."""
    if out.dtype.element_ty != tl.int8:
        return x.to(out.dtype.element_ty)
    elif out_scales is None:
        return bits_of(x, "int8", LEAST)
    else:
        return bits_of(x, "fp8")


def check_outputs(op: str, out: "torch.Tensor", quantized: "Quantized | None") -> None:
    """Raises ValueError for bits and scales of other types or shapes than the module's docstring has."""
    if quantized is None:
        return
    scales, scale = quantized
    if scales is None:
        fits = str(out.dtype) in ("torch.int8", "torch.float8_e4m3fn")
    else:
        kinds = [str(out.dtype), tuple(scales.shape), str(scales.dtype), scales.is_contiguous(), scales.device]
        fits = kinds == ["torch.int8", tuple(out.shape[:-1]), "torch.float32", True, out.device]
    if not fits or not scale > 0:
        seen = "none" if scales is None else f"{tuple(scales.shape)} {scales.dtype}"
        raise ValueError(
            f"{op}: got bits {tuple(out.shape)} {out.dtype}, scales {seen}, scale {scale}; expected (…, D) int8 and (…) fp32, "
            "contiguous, on one device, or (…, D) int8 or e4m3 alone, and a number above 0"
        )


def output_kinds(op: str, capability: int, dtype: str, kind: OutKind | None) -> tuple[dict[str, str], dict[str, None]]:
    """Triton's types of out, out_scales and out_scale; and those of them that are None. Raises ValueError for an SM without fp8."""
    if kind is not None:
        check_target("int8" if kind == "int8" else "fp8", op, capability)
    absent = [*(["out_scales"] if kind != "fp8" else []), *(["out_scale"] if kind is None else [])]
    pointers = {None: f"*{dtype}", "fp8": "*i8", "int8": "*i8", "e4m3": "*fp8e4nv"}
    types = {"out": pointers[kind], "out_scales": "*fp32", "out_scale": "fp32"}
    return types | dict.fromkeys(absent, "constexpr"), dict.fromkeys(absent)


def quantized_outputs(
    dtype: str, rows: Sequence[Expression], dim: int, out_scale: float | None, kind: OutKind | None
) -> tuple[list[Output], list[list[Any]], list[list[Any]]]:
    """Of a node: its outputs; arguments in place of out; and arguments behind the other numbers. rows: the shape before D."""
    types = {None: dtype, "fp8": "int8", "int8": "int8", "e4m3": "fp8"}
    outputs = [Output(type=types[kind], shape=[*rows, dim])]
    if kind == "fp8":
        outputs.append(Output(type="fp32", shape=[*rows]))
    return outputs, [["out", index] for index in range(len(outputs))], [] if kind is None else [["f32", out_scale]]
