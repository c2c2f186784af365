"""A branch's RMS norm, its residual sum and the RMS norm of that, as Gemma-2 has between any two products of a layer: a Triton
kernel, its ONNX function body, and cubins.

Its meaning is `normed_sum_truth` in sana_ref/norm_ops.py:

    hidden = x + norm(branch) (1 + branch_weight),  normed = norm(hidden) (1 + weight)

TensorRT for RTX makes one kernel of it too, which takes 7.2 us for 600 rows of 2304 channels in bf16, where an H200's memory would
allow 2.7. Here, in 4.1, a program has one row of D in its registers, in fp32, so that nothing is read twice, and what it reads is
under way before the first sum is needed. The second norm is that of the sum before it is rounded.

Dimensions: B texts, S tokens, D channels. x, branch, hidden, normed (B, S, D); branch_weight, weight (D,); all of one type.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.launch import Output
from plugins.rows import head_and_tail, num_warps, row_part, write_part

if TYPE_CHECKING:
    import onnx
    import torch

__all__ = ["DOMAIN", "INPUTS", "OP", "compile_cubin", "compile_cubins", "function_body", "launch"]

OP = "NormedSum"
DOMAIN = "sana"
INPUTS = ("x", "branch", "branch_weight", "weight")
# A thread, at most: one warp has Gemma's 2304, and its two sums need no barrier. Of 1 to 16 warps the fastest on an H200, 600
# rows in 4.0 us and 1000 in 5.3; 8 warps took 5.6 and 6.6 (benchmarks/results/kernel_plans_text_h200.json).
CHANNELS = 72


@triton.jit
def _load(tensor, row, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """fp32, of a part of a row; 0 where there are no channels."""
    d, live = row_part(START, SIZE, D)
    return tl.load(tensor + row * D + d, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _inverse(squares, eps, D: tl.constexpr):
    # Not rsqrt, which is off by two units in the last place, the same for a whole row: one number a row costs nothing.
    return tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / D) + eps))


@triton.jit
def kernel(
    x,
    branch,
    branch_weight,
    weight,
    hidden,
    normed,
    eps,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A program: one token."""
    row = tl.program_id(0).to(tl.int64)
    branch_head, x_head = _load(branch, row, 0, HEAD, D), _load(x, row, 0, HEAD, D)
    factor_head, last_head = 1.0 + _load(branch_weight, 0, 0, HEAD, D), 1.0 + _load(weight, 0, 0, HEAD, D)
    squares = tl.sum(branch_head * branch_head, axis=0)
    if TAIL > 0:
        branch_tail, x_tail = _load(branch, row, HEAD, TAIL, D), _load(x, row, HEAD, TAIL, D)
        factor_tail, last_tail = 1.0 + _load(branch_weight, 0, HEAD, TAIL, D), 1.0 + _load(weight, 0, HEAD, TAIL, D)
        squares += tl.sum(branch_tail * branch_tail, axis=0)
    inverse = _inverse(squares, eps, D)
    head = x_head + branch_head * inverse * factor_head
    squares = tl.sum(head * head, axis=0)
    write_part(hidden, row, head, 0, HEAD, D)
    if TAIL > 0:
        tail = x_tail + branch_tail * inverse * factor_tail
        squares += tl.sum(tail * tail, axis=0)
        write_part(hidden, row, tail, HEAD, TAIL, D)
    inverse = _inverse(squares, eps, D)
    write_part(normed, row, head * inverse * last_head, 0, HEAD, D)
    if TAIL > 0:
        write_part(normed, row, tail * inverse * last_tail, HEAD, TAIL, D)


def _constants(dim: int) -> dict[str, int]:
    return {"D": dim, **head_and_tail(dim)}


def launch(
    x: "torch.Tensor",
    branch: "torch.Tensor",
    branch_weight: "torch.Tensor",
    weight: "torch.Tensor",
    outputs: "tuple[torch.Tensor, torch.Tensor]",
    eps: float,
) -> None:
    """Write hidden and normed. Shapes as in the module's docstring, one dtype of fp16, bf16 or fp32, all contiguous, on the current
    GPU, else ValueError."""
    whole, dim = (x, branch, *outputs), x.shape[-1]
    tensors = (*whole, branch_weight, weight)
    fits = x.ndim == 3 and all(t.shape == x.shape for t in whole) and branch_weight.shape == weight.shape == (dim,)
    if not fits or not all(t.dtype == x.dtype and t.device == x.device and t.is_contiguous() for t in tensors):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in tensors)
        raise ValueError(
            f"{OP}: got x, branch, hidden, normed, weights {seen}; expected four times (B, S, D) and twice (D,), of one dtype and "
            "device, contiguous"
        )
    if x.numel() == 0:
        return
    grid = (x.shape[0] * x.shape[1],)
    kernel[grid](x, branch, branch_weight, weight, *outputs, eps, **_constants(dim), num_warps=num_warps(dim, CHANNELS))


@functools.cache
def compile_cubin(capability: int, dtype: str, dim: int) -> Cubin:
    """For an SM such as 89."""
    constants = _constants(dim)
    pointers = dict.fromkeys((*INPUTS, "hidden", "normed"), f"*{dtype}")
    return cubin.compile_cubin(
        kernel,
        capability,
        op=OP,
        signature=pointers | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=num_warps(dim, CHANNELS),
    )


def compile_cubins(targets: Iterable[str], dtype: str, dim: int, eps: float) -> dict[str, str | bytes | float]:
    """Every attribute of a `sana::NormedSum` node for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype: "fp16", "bf16" or "fp32" of all tensors, else ValueError. dim: D, at least 1, else ValueError. The function body reads
    eps.
    """
    cubin.check_type(OP, dtype)
    rows = [["dim", 0, axis] for axis in range(2)]
    whole = Output(type=dtype, shape=[*rows, dim])
    found = cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, dim),
        inputs=[dtype] * len(INPUTS),
        outputs=[whole, whole],
        grid=[["mul", *rows], 1, 1],
        args=[*(["in", index] for index in range(4)), ["out", 0], ["out", 1], ["f32", eps]],
    )
    return found | {"eps": eps}


def function_body(opset: int = 20) -> "onnx.FunctionProto":
    """In standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to x's type.

    Attribute eps, required; the plugin's are allowed and unused. opset: of the standard operators, 18 or newer; it must equal the
    model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def norm(name: str, factor: str) -> "list[onnx.NodeProto]":
        """{name}_normed: the norm of `name`, (B, S, D), times 1 + `factor`."""
        return [
            helper.make_node("Mul", [name, name], [f"{name}_squares"]),
            helper.make_node("ReduceMean", [f"{name}_squares", "channels"], [f"{name}_mean"]),
            helper.make_node("Add", [f"{name}_mean", "eps"], [f"{name}_mean_eps"]),
            helper.make_node("Sqrt", [f"{name}_mean_eps"], [f"{name}_root"]),
            helper.make_node("Div", [name, f"{name}_root"], [f"{name}_unit"]),
            helper.make_node("Add", [f"{factor}_wide", "one"], [f"{factor}_whole"]),
            helper.make_node("Mul", [f"{name}_unit", f"{factor}_whole"], [f"{name}_normed"]),
        ]

    eps = helper.make_node("Constant", [], ["eps"])
    eps.attribute.append(AttributeProto(name="value_float", type=AttributeProto.FLOAT, ref_attr_name="eps"))
    nodes = [
        eps,
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Constant", [], ["channels"], value_ints=[-1]),
        *(helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in INPUTS),
        *norm("branch_wide", "branch_weight"),
        helper.make_node("Add", ["x_wide", "branch_wide_normed"], ["sum"]),
        helper.make_node("CastLike", ["sum", "x"], ["hidden"]),
        *norm("sum", "weight"),
        helper.make_node("CastLike", ["sum_normed", "x"], ["normed"]),
    ]
    return helper.make_function(
        DOMAIN,
        OP,
        list(INPUTS),
        ["hidden", "normed"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["eps"],
        attribute_protos=[helper.make_attribute(name, "") for name in ("launch", "cubins", "plugin_version", "plugin_namespace")],
    )
