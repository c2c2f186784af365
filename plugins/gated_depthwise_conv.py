"""The middle of Sana's mix-FFN, SiLU, depth-wise 3x3 and gate: launches, ONNX function body and cubins of its kernel.

Its meaning is `gated_depthwise_conv_truth` in sana_ref/gated_conv_ops.py:

    y = a silu(g), where [a, g] = depthwise3x3(silu(x)) + bias, with zeros around the picture

Operator by operator it is bound by memory, and reads and writes its widest tensors several times. The kernel, in
plugins/gated_depthwise_conv_kernel.py, reads x once and writes y once, with the channels last, as the matrix products on both sides
have them. Where a product in 8 bits follows, a build for TensorRT gives a node an `out_scale` (plugins/static_scale.py).

Dimensions: B pictures, H x W pixels, E channels of a half; in a program C channels.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from plugins import cubin
from plugins.cubin import Cubin
from plugins.gated_depthwise_conv_kernel import gate_kernel
from plugins.static_scale import OutKind, check_outputs, output_kinds, quantized_outputs

if TYPE_CHECKING:
    import onnx
    import torch

    from plugins.static_scale import Quantized

OP = "GatedDepthwiseConv"
DOMAIN = "sana"
COLUMNS = 4  # of a strip: written out in the kernel
# What follows was measured on an H200 (benchmarks/results/kernel_plans_h200.json).
ROWS, LEAST_ROWS = 32, 16  # that a program walks down, two more are read; small pictures need more programs (`least_rows`)
BLOCK_C, NUM_WARPS = 128, 2  # a thread has two channels
MAX_REGISTERS = 120  # of a thread; with more there is room for fewer programs: 28.3 us in place of 24.4, of 5600 channels to FP8
WAVE = 132 * 8  # programs that an H200 runs at a time, by their registers


def least_rows(inner: int) -> int:
    """Of a program, for E channels of a half.

    The usual work, two pictures of 32 x 32 tokens, is little for a GPU: a wave of programs or a bit more, for which it takes as
    long as for the whole of the last. Of 5600 channels these are 1.3 waves with 16 rows and 2 with 11, 28.4 and 24.4 us to FP8.
    """
    strips = -(-inner // BLOCK_C) * 2 * 32 // COLUMNS
    return min((LEAST_ROWS, 11, 8), key=lambda rows: -(-strips * -(-32 // rows) // WAVE) * (rows + 2))


def plan(
    *, batch: int, height: int, width: int, channels: int, least: int | None = None
) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """For a kernel that walks over (batch, height, width, channels): programs of channels, of strips in a picture and of pictures;
    and its options. least: rows of a program for heights up to 32; from 64 on it has ROWS. Without it they are a quarter of the
    height, LEAST_ROWS or more: for the gradient's kernels."""
    rows = min(ROWS, max(LEAST_ROWS, height // 4) if least is None else max(least, height - 32))
    programs = (-(-channels // BLOCK_C), -(-width // COLUMNS) * -(-height // rows), batch)
    return programs, {"rows": rows, "C": BLOCK_C, "num_warps": NUM_WARPS, "enable_fp_fusion": True}


def check(
    x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor", *others: "torch.Tensor", inner: int, quantized: bool = False
) -> None:
    """Raises ValueError unless x (B, H, W, 2E), weight (3, 3, 2E) and bias (2E,) have E = inner, x and the others (B, H, W, …) are
    contiguous and of one dtype, bf16, fp16 or fp32, and all are on one device. quantized: the others are of another dtype."""
    fits = x.ndim == 4 and x.shape[3] == 2 * inner and weight.shape == (3, 3, 2 * inner) and bias.shape == (2 * inner,)
    fits = fits and str(x.dtype).removeprefix("torch.") in ("float16", "bfloat16", "float32")
    fits = fits and all(t.is_contiguous() and t.shape[:3] == x.shape[:3] for t in (x, *others))
    fits = fits and (quantized or all(t.dtype == x.dtype for t in others))
    if not fits or any(t.device != x.device for t in (weight, bias, *others)):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in (x, weight, bias, *others))
        raise ValueError(
            f"{OP}: got {seen}; expected x (B, H, W, 2E) of fp16, bf16 or fp32, weight (3, 3, 2E), bias (2E,), and others "
            "(B, H, W, …) of x's dtype, on one device; all but weight and bias contiguous"
        )


def launch(
    x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor", y: "torch.Tensor", quantized: "Quantized | None" = None
) -> None:
    """Write the op's result into y (B, H, W, E). x (B, H, W, 2E), of y's dtype; weight (3, 3, 2E), bias (2E,) of any.

    x and y: contiguous, of bf16, fp16 or fp32, on the current GPU, else ValueError, as for other shapes. quantized: y is in 8
    bits; also write these scales, if any.
    """
    check_outputs(OP, y, quantized)
    batch, height, width, inner = y.shape
    check(x, weight, bias, y, inner=inner, quantized=quantized is not None)
    if y.numel() == 0:
        return
    programs, options = plan(batch=batch, height=height, width=width, channels=inner, least=least_rows(inner))
    scales, scale = quantized or (None, None)
    tensors = (x, weight.contiguous(), bias.contiguous(), x, y, scales)
    options |= {"maxnreg": MAX_REGISTERS}
    gate_kernel[programs](*tensors, height, width, out_scale=scale, inner=inner, BACKWARD=False, **options)


@functools.cache
def compile_cubin(capability: int, dtype: str, inner: int, quantized: OutKind | None = None) -> Cubin:
    """For an SM such as 89. inner: E. Raises ValueError for an SM without fp8, if that is asked for."""
    kinds, absent = output_kinds(OP, capability, dtype, quantized)
    pointers = dict.fromkeys(("x", "weight", "bias", "dy"), f"*{dtype}")
    pointers |= {name: kinds[name] for name in ("out", "out_scales")}
    signature = pointers | dict.fromkeys(("height", "width", "rows"), "i32") | {"out_scale": kinds["out_scale"]}
    return cubin.compile_cubin(
        gate_kernel,
        capability,
        op=OP,
        signature=signature | dict.fromkeys(("inner", "C", "BACKWARD"), "constexpr"),
        constants={"inner": inner, "C": BLOCK_C, "BACKWARD": False} | absent,
        aligned=pointers,
        num_warps=NUM_WARPS,
        max_registers=MAX_REGISTERS,
    )


def compile_cubins(
    targets: Iterable[str], dtype: str, channels: int, out_scale: float | None = None, out_kind: OutKind = "fp8"
) -> dict[str, str | bytes | int]:
    """Every attribute of a `sana::GatedDepthwiseConv` node for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of all tensors; channels: 2E, which the function body reads. out_scale, out_kind: of bits, where
    they are the output. Raises ValueError for others.
    """
    cubin.check_type(OP, dtype)
    if channels < 2 or channels % 2:
        raise ValueError(f"{OP}: got {channels} channels; expected an even number: values, then gates")
    inner = channels // 2
    batch, height, width = (["dim", 0, axis] for axis in range(3))
    kind = out_kind if out_scale is not None else None
    rows = ["min", ROWS, ["max", least_rows(inner), ["sub", height, 32]]]
    strips = ["mul", ["ceildiv", width, COLUMNS], ["ceildiv", height, rows]]
    outputs, more_args, last_args = quantized_outputs(dtype, [batch, height, width], inner, out_scale, kind)
    found = cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, inner, kind),
        inputs=[dtype] * 3,
        outputs=outputs,
        grid=[-(-inner // BLOCK_C), strips, batch],
        args=[
            *(["in", index] for index in (0, 1, 2, 0)),
            *more_args,
            *(["i32", number] for number in (height, width, rows)),
            *last_args,
        ],
    )
    return found | {"channels": channels}


def function_body(opset: int = 20) -> "onnx.FunctionProto":
    """The op in standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to x's type, whatever that is.

    Inputs x (B, H, W, 2E), weight (3, 3, 2E), bias (2E,), output out (B, H, W, E). Attribute channels, 2E, required; the
    plugin's attributes are allowed and unused. opset: of the standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import TensorProto, helper

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> "onnx.NodeProto":
        return helper.make_node(op, inputs, outputs, **attributes)

    conv = node("Conv", ["activated", "filters", "bias_wide"], ["conv"], pads=[1, 1, 1, 1])
    group = helper.make_attribute("group", 1)
    group.ClearField("i")
    group.ref_attr_name = "channels"
    conv.attribute.append(group)
    nodes = [
        *(node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in ("x", "weight", "bias")),
        node("Transpose", ["x_wide"], ["x_first"], perm=[0, 3, 1, 2]),
        node("Sigmoid", ["x_first"], ["x_sigmoid"]),
        node("Mul", ["x_first", "x_sigmoid"], ["activated"]),
        node("Transpose", ["weight_wide"], ["taps"], perm=[2, 0, 1]),
        node("Constant", [], ["one"], value_ints=[1]),
        node("Unsqueeze", ["taps", "one"], ["filters"]),
        conv,
        node("Split", ["conv"], ["a", "g"], axis=1, num_outputs=2),
        node("Sigmoid", ["g"], ["g_sigmoid"]),
        node("Mul", ["g", "g_sigmoid"], ["gate"]),
        node("Mul", ["a", "gate"], ["y_first"]),
        node("Transpose", ["y_first"], ["y"], perm=[0, 2, 3, 1]),
        node("CastLike", ["y", "x"], ["out"]),
    ]
    return helper.make_function(
        DOMAIN,
        OP,
        ["x", "weight", "bias"],
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["channels"],
        attribute_protos=[helper.make_attribute(name, "") for name in ("launch", "cubins", "plugin_version", "plugin_namespace")],
    )
