"""A modulated norm that adds the branch before it: its Triton kernel, ONNX function bodies, and cubins.

Its meaning is `modulated_norm_truth` in sana_ref/ops.py:

    hidden = x + gate branch,  normed = norm(hidden) (1 + scale) + shift

Operator by operator a dozen small kernels run between two matrix products, and most of them read or write all tokens. Here x and
branch are read once, hidden and normed written once; gate, scale and shift are rows of a table and of the time's embedding, added
where they are used, so that no kernel slices or adds them before. Two ops, because an ONNX function has no optional inputs:

    ModulatedNorm         x, branch, time, table -> hidden, normed, without a gate
    GatedModulatedNorm    x, branch, time, table, gate_time, gate_table -> hidden, normed

A program has one row of D in its registers, in fp32: the variance is that of centred values, and the norm that of the sum before it
is rounded.

Where products in 8 bits follow, a build for TensorRT sets `quantized` of the Variant. The outputs are then hidden, and normed in 8
bits, not rounded to x's type before. Function bodies and the op for PyTorch have no such form.

    fp8     bits (B, N, D) int8 and scale (B, N) fp32, quantised as in plugins/fp8_quantize.py
    int8    (B, N, D) int8, quantised with one scale, `out_scale`, as in plugins/static_scale.py
    e4m3    (B, N, D) of FP8, the same

Dimensions: B images, N tokens, D channels, R rows of a table. x, branch, hidden, normed (B, N, D); table, gate_table (R, D); time,
gate_time (B, R D), or (B, D), which serves all rows alike.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.eight_bits import check_target
from plugins.fp8_quantize import quantized
from plugins.launch import Output
from plugins.static_scale import OutKind, as_output

if TYPE_CHECKING:
    import onnx
    import torch

    Modulation = tuple[torch.Tensor, torch.Tensor]  # time, table

PLAIN, GATED = "ModulatedNorm", "GatedModulatedNorm"
DOMAIN = "sana"
INPUTS = {PLAIN: ("x", "branch", "time", "table"), GATED: ("x", "branch", "time", "table", "gate_time", "gate_table")}
# Measured on an H200: a row of 2240 channels is fastest with one warp or two, of 1152 with one; 8 and more take a quarter longer.
CHANNELS, MAX_WARPS = 64, 16  # channels a thread


@triton.jit
def modulation_row(time, table, image, d_D, live_D, ROW: tl.constexpr, TIME_ROWS: tl.constexpr, D: tl.constexpr):
    """(D,), fp32: a row of the table and of the time."""
    time_D = tl.load(time + (image * TIME_ROWS + ROW % TIME_ROWS) * D + d_D, mask=live_D, other=0.0)
    table_D = tl.load(table + ROW * D + d_D, mask=live_D, other=0.0)
    return table_D.to(tl.float32) + time_D.to(tl.float32)


@triton.jit
def norm_kernel(
    x,
    branch,
    time,
    table,
    gate_time,
    gate_table,
    hidden,
    normed,
    normed_scale,
    tokens,
    eps,
    out_scale,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,
    TIME_ROWS: tl.constexpr,
    GATE_TIME_ROWS: tl.constexpr,
    RMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: one token. GATE: a row, or -1 for none. normed_scale and out_scale: None, or normed has such scales."""
    token = tl.program_id(0)
    image = token // tokens
    d_D = tl.arange(0, BLOCK)
    live_D = d_D < D
    at_D = token.to(tl.int64) * D + d_D  # int64: 64 images of 4096 px pass 2**31 elements
    branch_D = tl.load(branch + at_D, mask=live_D, other=0.0).to(tl.float32)
    if GATE >= 0:
        branch_D *= modulation_row(gate_time, gate_table, image, d_D, live_D, GATE, GATE_TIME_ROWS, D)
    hidden_D = tl.load(x + at_D, mask=live_D, other=0.0).to(tl.float32) + branch_D
    tl.store(hidden + at_D, hidden_D.to(hidden.dtype.element_ty), mask=live_D)
    if not RMS:
        hidden_D = tl.where(live_D, hidden_D - tl.sum(hidden_D, axis=0) * (1.0 / D), 0.0)
    scale_D = modulation_row(time, table, image, d_D, live_D, SCALE, TIME_ROWS, D)
    shift_D = modulation_row(time, table, image, d_D, live_D, SHIFT, TIME_ROWS, D)
    # Not rsqrt, which is off by two units in the last place, the same for a whole row: one number a row costs nothing.
    norm_D = hidden_D * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(hidden_D * hidden_D, axis=0) * (1.0 / D) + eps))
    normed_D = norm_D * (1.0 + scale_D) + shift_D
    if normed_scale is not None:
        normed_D, row_scale = quantized(normed_D, live_D)
        tl.store(normed_scale + token, row_scale)
    if out_scale is not None:
        normed_D = as_output(normed_D * tl.div_rn(1.0, out_scale), normed, None)
    tl.store(normed + at_D, normed_D.to(normed.dtype.element_ty), mask=live_D)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What a kernel is compiled for.

    dim: D. rows: of shift, scale and, where there is one, the gate in their tables. time_rows, gate_time_rows: R of their times, 1
    if a time serves all rows alike. quantized: what is in place of normed, as in the module's docstring. Raises ValueError where
    that does not fit together.
    """

    dim: int
    rows: tuple[int, ...]
    time_rows: int
    gate_time_rows: int = 1
    rms: bool = False
    quantized: OutKind | None = None

    def __post_init__(self) -> None:
        widest = (self.time_rows, self.time_rows, self.gate_time_rows)[: len(self.rows)]
        fits = all(0 <= row and (num == 1 or row < num) for row, num in zip(self.rows, widest, strict=False))
        if self.dim < 1 or len(self.rows) not in (2, 3) or not fits or min(self.time_rows, self.gate_time_rows) < 1:
            raise ValueError(f"{PLAIN}: got {self}; expected rows of shift, scale and maybe a gate that the times have, and D >= 1")

    @property
    def op(self) -> str:
        return GATED if len(self.rows) == 3 else PLAIN

    @property
    def static(self) -> bool:
        """Whether normed has one scale, which is known before."""
        return self.quantized in ("int8", "e4m3")

    @property
    def constants(self) -> dict[str, int | bool]:
        shift, scale, gate = (*self.rows, -1)[:3]
        times = {"TIME_ROWS": self.time_rows, "GATE_TIME_ROWS": self.gate_time_rows}
        block = triton.next_power_of_2(self.dim)
        return {"SHIFT": shift, "SCALE": scale, "GATE": gate, **times, "RMS": self.rms, "D": self.dim, "BLOCK": block}

    @property
    def num_warps(self) -> int:
        return min(max(triton.next_power_of_2(self.dim) // (32 * CHANNELS), 1), MAX_WARPS)


def launch(
    x: "torch.Tensor",
    branch: "torch.Tensor",
    modulation: "Modulation",
    gate: "Modulation | None",
    outputs: "tuple[torch.Tensor, ...]",
    *,
    rows: tuple[int, ...],
    rms: bool,
    eps: float,
    out_scale: float | None = None,
) -> None:
    """Write the outputs: hidden and normed; hidden, bits and scale, which is FP8; or, with an out_scale, hidden and numbers of it.

    x, branch, hidden and normed: one shape and dtype of fp16, bf16, fp32. bits: int8, numbers: int8 or e4m3, of that shape. scale:
    (B, N), fp32. All contiguous, on the current GPU, out_scale above 0, else ValueError. Times and tables: of any floating dtype.
    """
    kind: OutKind | None = "fp8" if len(outputs) == 3 else None
    if out_scale is not None:
        kind = "e4m3" if str(outputs[-1].dtype) == "torch.float8_e4m3fn" else "int8"
    tensors, same = (x, branch, *outputs), (x.shape, str(x.dtype))
    narrow, scales = (x.shape, "torch.int8"), (x.shape[:-1], "torch.float32")
    last = {None: [same], "int8": [narrow], "e4m3": [(x.shape, "torch.float8_e4m3fn")], "fp8": [narrow, scales]}[kind]
    kinds = [same, same, same, *last]
    alike = [(t.shape, str(t.dtype)) for t in tensors] == kinds
    positive = out_scale is None or out_scale > 0
    if not alike or not positive or not all(t.is_contiguous() and t.device == x.device for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            f"{PLAIN}: got {seen}, out_scale {out_scale}; expected one shape (B, N, D), dtype and device, all contiguous, or "
            "(B, N, D) int8 and (B, N) fp32 in place of normed, or (B, N, D) int8 or e4m3 alone and a scale above 0"
        )
    if x.numel() == 0:
        return
    batch, tokens, dim = x.shape
    time, gate_time = modulation[0], (gate or modulation)[0]
    variant = Variant(
        dim=dim,
        rows=rows,
        time_rows=time.shape[1] // dim,
        gate_time_rows=gate_time.shape[1] // dim if gate else 1,
        rms=rms,
        quantized=kind,
    )
    rest = (t.contiguous() for t in (*modulation, *(gate or modulation)))
    written = (*outputs, None)[:3]
    numbers = (tokens, eps, out_scale)
    norm_kernel[(batch * tokens,)](x, branch, *rest, *written, *numbers, **variant.constants, num_warps=variant.num_warps)


@functools.cache
def compile_cubin(capability: int, dtype: str, variant: Variant) -> Cubin:
    """For an SM such as 89. Raises ValueError for one that has no fp8, if the variant has."""
    constants: dict[str, int | bool | None] = {**variant.constants}
    pointers = dict.fromkeys((*INPUTS[GATED], "hidden", "normed"), f"*{dtype}")
    if variant.quantized is not None:
        check_target("int8" if variant.quantized == "int8" else "fp8", variant.op, capability)
        pointers["normed"] = "*fp8e4nv" if variant.quantized == "e4m3" else "*i8"
    if variant.quantized == "fp8":
        pointers["normed_scale"] = "*fp32"
    else:
        constants["normed_scale"] = None  # so that the kernel has no such parameter
    if not variant.static:
        constants["out_scale"] = None
    # In the order of the kernel's parameters.
    signature = pointers | {"normed_scale": pointers.get("normed_scale", "constexpr"), "tokens": "i32", "eps": "fp32"}
    signature["out_scale"] = "fp32" if variant.static else "constexpr"
    return cubin.compile_cubin(
        norm_kernel,
        capability,
        op=variant.op,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=variant.num_warps,
    )


def compile_cubins(
    targets: Iterable[str], dtype: str, variant: Variant, eps: float, out_scale: float | None = None
) -> dict[str, str | bytes | int | float | list[int]]:
    """Every attribute of a node of `variant.op` for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of all tensors but bits and scale, else ValueError, also for a target that lacks what the variant
    needs. out_scale: of int8 and e4m3. The function bodies read rows, rms and eps.
    """
    cubin.check_type(variant.op, dtype)
    if (out_scale is not None) != variant.static:
        raise ValueError(f"{variant.op}: got {variant.quantized} with out_scale {out_scale}; expected one for int8 and e4m3 alone")
    shape = [["dim", 0, axis] for axis in range(2)]
    inputs = INPUTS[variant.op]
    whole = [*shape, variant.dim]
    types = {None: dtype, "fp8": "int8", "int8": "int8", "e4m3": "fp8"}
    outputs = [Output(type=dtype, shape=whole), Output(type=types[variant.quantized], shape=whole)]
    if variant.quantized == "fp8":
        outputs.append(Output(type="fp32", shape=shape))
    found = cubin.attributes(
        variant.op,
        targets,
        lambda capability: compile_cubin(capability, dtype, variant),
        inputs=[dtype] * len(inputs),
        outputs=outputs,
        grid=[["mul", *shape], 1, 1],
        args=[
            *(["in", index] for index in (0, 1, 2, 3, len(inputs) - 2, len(inputs) - 1)),  # without a gate the kernel reads no more
            *(["out", index] for index in range(len(outputs))),
            ["i32", shape[1]],
            ["f32", eps],
            *([["f32", out_scale]] if out_scale is not None else []),
        ],
    )
    return found | {"rows": list(variant.rows), "rms": int(variant.rms), "eps": eps}


def function_body(op: str, opset: int = 20) -> "onnx.FunctionProto":
    """PLAIN or GATED in standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to x's type.

    Attributes rows (of shift, scale and, GATED, gate), rms (1: RMSNorm, 0: LayerNorm) and eps, all required; the plugin's are
    allowed and unused. opset: of the standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def from_attribute(name: str, kind: "AttributeProto.AttributeType", field: str) -> "onnx.NodeProto":
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(AttributeProto(name=field, type=kind, ref_attr_name=name))
        return node

    def constant(name: str, *values: int) -> "onnx.NodeProto":
        return helper.make_node("Constant", [], [name], value_ints=list(values))

    def modulation(time: str, table: str, rows: dict[str, int]) -> "list[onnx.NodeProto]":
        """Tables with the times added, (B, R, D), and of them those rows, (B, 1, D), that `rows` has by number."""
        nodes = [
            helper.make_node("Shape", [table], [f"{table}_dim"], start=-1),
            helper.make_node("Concat", ["images_rows", f"{table}_dim"], [f"{table}_shape"], axis=0),
            helper.make_node("Reshape", [f"{time}_wide", f"{table}_shape"], [f"{time}_rows"]),
            helper.make_node("Add", [f"{time}_rows", f"{table}_wide"], [f"{table}_all"]),
        ]
        for name, number in rows.items():
            nodes += [
                constant(f"{name}_number", number),
                helper.make_node("Gather", ["rows", f"{name}_number"], [f"{name}_row"]),
                helper.make_node("Gather", [f"{table}_all", f"{name}_row"], [name], axis=1),
            ]
        return nodes

    branch = "branch_wide"
    nodes = [
        from_attribute("rows", AttributeProto.INTS, "value_ints"),
        from_attribute("rms", AttributeProto.INT, "value_int"),
        from_attribute("eps", AttributeProto.FLOAT, "value_float"),
        constant("images_rows", 0, -1),
        constant("channels", -1),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        *(helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in INPUTS[op]),
        *modulation("time", "table", {"shift": 0, "scale": 1}),
    ]
    if op == GATED:
        branch = "gated"
        nodes += [*modulation("gate_time", "gate_table", {"gate": 2}), helper.make_node("Mul", ["branch_wide", "gate"], ["gated"])]
    nodes += [
        helper.make_node("Add", ["x_wide", branch], ["sum"]),
        helper.make_node("CastLike", ["sum", "x"], ["hidden"]),
        # An RMSNorm is a LayerNorm whose mean is taken to be zero.
        helper.make_node("Cast", ["rms"], ["rms_wide"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "rms_wide"], ["layer"]),
        helper.make_node("ReduceMean", ["sum", "channels"], ["mean"]),
        helper.make_node("Mul", ["mean", "layer"], ["centre"]),
        helper.make_node("Sub", ["sum", "centre"], ["centred"]),
        helper.make_node("Mul", ["centred", "centred"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "channels"], ["variance"]),
        helper.make_node("Add", ["variance", "eps"], ["variance_eps"]),
        helper.make_node("Sqrt", ["variance_eps"], ["deviation"]),
        helper.make_node("Div", ["centred", "deviation"], ["norm"]),
        helper.make_node("Add", ["scale", "one"], ["factor"]),
        helper.make_node("Mul", ["norm", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["normed_wide"]),
        helper.make_node("CastLike", ["normed_wide", "x"], ["normed"]),
    ]
    return helper.make_function(
        DOMAIN,
        op,
        list(INPUTS[op]),
        ["hidden", "normed"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["rows", "rms", "eps"],
        attribute_protos=[helper.make_attribute(name, "") for name in ("launch", "cubins", "plugin_version", "plugin_namespace")],
    )
