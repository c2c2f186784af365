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
from plugins.fp8_quantize import magnitude, row_scale, write_bits
from plugins.launch import Output
from plugins.rows import head_and_tail, modulation_row, num_warps, row_part, summed, write_part
from plugins.static_scale import OutKind, as_output

if TYPE_CHECKING:
    import onnx
    import torch

    Modulation = tuple[torch.Tensor, torch.Tensor]  # time, table

PLAIN, GATED = "ModulatedNorm", "GatedModulatedNorm"
DOMAIN = "sana"
INPUTS = {PLAIN: ("x", "branch", "time", "table"), GATED: ("x", "branch", "time", "table", "gate_time", "gate_table")}
# Channels a thread, at most; to FP8, and else. Measured on an H200 with rows of 1152 and 2240: to FP8, which looks for the largest
# first, one warp and two are fastest, else two and four.
FP8_CHANNELS, CHANNELS = 40, 20


@triton.jit
def _modulated(
    norm,
    time,
    table,
    image,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    TIME_ROWS: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """normed, fp32, of a part of the row, and its magnitude."""
    d, live = row_part(START, SIZE, D)
    scale = modulation_row(time, table, image, d, live, SCALE, TIME_ROWS, D)
    normed = norm * (1.0 + scale) + modulation_row(time, table, image, d, live, SHIFT, TIME_ROWS, D)
    return normed, magnitude(normed, live)


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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A program: one token. GATE: a row, or -1 for none. normed_scale and out_scale: None, or normed has such scales."""
    row = tl.program_id(0).to(tl.int64)  # int64: 64 images of 4096 px pass 2**31 elements
    image = tl.program_id(0) // tokens
    head = summed(x, branch, gate_time, gate_table, image, row, GATE, GATE_TIME_ROWS, None, 0, HEAD, D)
    if TAIL > 0:
        tail = summed(x, branch, gate_time, gate_table, image, row, GATE, GATE_TIME_ROWS, None, HEAD, TAIL, D)
    write_part(hidden, row, head, 0, HEAD, D)
    if TAIL > 0:
        write_part(hidden, row, tail, HEAD, TAIL, D)
    if not RMS:
        total = tl.sum(head, axis=0)
        if TAIL > 0:
            total += tl.sum(tail, axis=0)
            tail = tl.where(row_part(HEAD, TAIL, D)[1], tail - total * (1.0 / D), 0.0)
        head = tl.where(row_part(0, HEAD, D)[1], head - total * (1.0 / D), 0.0)
    squares = tl.sum(head * head, axis=0)
    if TAIL > 0:
        squares += tl.sum(tail * tail, axis=0)
    # Not rsqrt, which is off by two units in the last place, the same for a whole row: one number a row costs nothing.
    inverse = tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / D) + eps))
    head, largest = _modulated(head * inverse, time, table, image, SHIFT, SCALE, TIME_ROWS, 0, HEAD, D)
    if TAIL > 0:
        tail, other = _modulated(tail * inverse, time, table, image, SHIFT, SCALE, TIME_ROWS, HEAD, TAIL, D)
        largest = tl.maximum(largest, other)
    if normed_scale is not None:
        own_scale, inverse = row_scale(largest)
        tl.store(normed_scale + row, own_scale)
        write_bits(normed, row, head, inverse, 0, HEAD, D)
        if TAIL > 0:
            write_bits(normed, row, tail, inverse, HEAD, TAIL, D)
    else:
        if out_scale is not None:
            inverse = tl.div_rn(1.0, out_scale)
            head = as_output(head * inverse, normed, None)
            if TAIL > 0:
                tail = as_output(tail * inverse, normed, None)
        write_part(normed, row, head, 0, HEAD, D)
        if TAIL > 0:
            write_part(normed, row, tail, HEAD, TAIL, D)


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
        row = {"D": self.dim, **head_and_tail(self.dim)}
        return {"SHIFT": shift, "SCALE": scale, "GATE": gate, **times, "RMS": self.rms, **row}

    @property
    def num_warps(self) -> int:
        return num_warps(self.dim, FP8_CHANNELS if self.quantized == "fp8" else CHANNELS)


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
    (B, N), fp32. All contiguous, on the current GPU, out_scale above 0, else ValueError. Times and tables: of any floating dtype,
    and of shapes as the module's docstring says, else ValueError.
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
    for (times, table), of in ((modulation, rows[:2]), *([(gate, rows[2:])] if gate else [])):
        fits = table.ndim == 2 and table.shape[1] == dim and max(of) < table.shape[0]
        if not fits or times.shape not in ((batch, dim), (batch, table.numel())):
            raise ValueError(
                f"{PLAIN}: got a time {tuple(times.shape)} and a table {tuple(table.shape)} for rows {of}; expected (B, R D) or "
                f"(B, D) and (R, D), B {batch}, D {dim}, with those rows"
            )
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
