"""ReLU linear attention: the Triton kernel, its launch plan, its ONNX function body, and its cubins for GPUs that are not here.

Its meaning is `relu_linear_attention_truth` in sana_ref/ops.py:

    out = relu(q) S / (relu(q) z + eps), where S = relu(k)^T v and z = the sum of relu(k) over N

Dimensions: B images, H heads, N tokens, D channels per head. One program per image and head keeps S (D x D) and z in registers,
reads k and v once, then q once: the least memory traffic there is. Not split over N: 2 images x 70 heads already fill the 132
multiprocessors of an H100, and a split would need scratch memory, a second kernel, and an order of summation to keep fixed.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from plugins import cubin
from plugins.cubin import Cubin
from plugins.launch import Output

if TYPE_CHECKING:
    import onnx
    import torch

OP = "ReluLinearAttention"
DOMAIN = "sana"
EPS = 1e-15  # as sana_ref.ops.EPS; a test holds the two together
HEAD_DIMS = (16, 32, 64, 128)  # 16: the least that a tensor core takes; above 128 S no longer fits in registers
STRIDES = ("in_B", "in_H", "in_N", "out_B", "out_H", "out_N")


@triton.jit
def _relu(x):
    # A NaN must come out as NaN, as from torch.relu; plain maximum would turn it into 0.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_linear_attention_kernel(
    q, k, v, out, in_B, in_H, in_N, out_B, out_H, out_N, num_heads, n_tokens, eps, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """in_B, in_H, in_N: strides of q, k and v, in elements; out_…: of out. Those of channels are 1."""
    image, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    image, head = image.to(tl.int64), head.to(tl.int64)  # 64 images of 4096 px pass 2**31 elements
    d = tl.arange(0, D)
    given_D, result_D = image * in_B + head * in_H + d, image * out_B + head * out_H + d
    state_DD, z_D = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for start in range(0, n_tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at, live = given_D[None, :] + n.to(tl.int64)[:, None] * in_N, n[:, None] < n_tokens
        k_ND = _relu(tl.load(k + at, mask=live, other=0.0)).to(k.dtype.element_ty)
        v_ND = tl.load(v + at, mask=live, other=0.0)
        # ieee: for fp32 inputs; the default, TF32, has 10 bits of mantissa. Half precision products are exact in fp32 anyway.
        state_DD = tl.dot(tl.trans(k_ND), v_ND, state_DD, input_precision="ieee")
        z_D += tl.sum(k_ND.to(tl.float32), axis=0)
    for start in range(0, n_tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n64_N1, live = n.to(tl.int64)[:, None], n[:, None] < n_tokens
        q_ND = _relu(tl.load(q + given_D[None, :] + n64_N1 * in_N, mask=live, other=0.0)).to(tl.float32)
        top_ND = tl.dot(q_ND, state_DD, input_precision="ieee")
        bottom_N = tl.sum(q_ND * z_D[None, :], axis=1) + eps
        out_ND = tl.div_rn(top_ND, bottom_N[:, None]).to(out.dtype.element_ty)
        tl.store(out + result_D[None, :] + n64_N1 * out_N, out_ND, mask=live)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """grid in programs; block_n tokens a step; num_stages loads of k and v under way at once."""

    grid: tuple[int, int, int]
    block_n: int
    num_warps: int
    num_stages: int


def plan(*, batch: int, heads: int, head_dim: int, dtype: str) -> LaunchPlan:
    """How to launch for inputs (batch, heads, any, head_dim) of "fp16", "bf16" or "fp32". Reasoned.

    The tiles keep registers from spilling by more than a few bytes, and shared memory within MAX_SHARED, on every architecture: S
    is head_dim**2 fp32 in registers (64 KiB at 128) and again in shared memory, where the product with q reads it.
    Raises ValueError for a head_dim or dtype that the kernel has not.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"{OP}: got head_dim {head_dim}; expected one of {HEAD_DIMS}. Zero channels may be padded on: they change nothing"
        )
    cubin.check_type(OP, dtype)
    wide = dtype == "fp32"
    block_n, num_warps, num_stages = {
        16: (64, 4, 3),
        32: (64, 4, 3),
        64: (32 if wide else 64, 8, 2),
        128: (16 if wide else 32, 8, 2),
    }[head_dim]
    return LaunchPlan(grid=(batch * heads, 1, 1), block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def launch(q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", out: "torch.Tensor", eps: float = EPS) -> None:
    """Write the attention of q, k, v into out: all (B, H, N, D), one dtype of fp16, bf16, fp32, on the current GPU.

    Any strides. q, k and v are read as they lie where they have the same strides and 1 between channels, as views of one
    projection have, and copied first where not; so is out, afterwards.
    Raises ValueError unless shape, dtype and device are one and D is in HEAD_DIMS.
    """
    if not all(t.shape == q.shape and t.dtype == q.dtype and t.device == q.device for t in (q, k, v, out)):
        seen = "; ".join(f"{tuple(t.shape)} {t.dtype} {t.device}" for t in (q, k, v, out))
        raise ValueError(f"{OP}: got q, k, v, out {seen}; expected one shape, dtype and device")
    batch, heads, tokens, head_dim = q.shape
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(q.dtype), str(q.dtype))
    tile = plan(batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)
    if q.numel() == 0:
        return
    if q.stride(-1) != 1 or not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    options = {"D": head_dim, "BLOCK_N": tile.block_n, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    to = out if out.stride(-1) == 1 else out.new_empty(out.shape)
    strides = (*q.stride()[:3], *to.stride()[:3])
    relu_linear_attention_kernel[tile.grid](q, k, v, to, *strides, heads, tokens, eps, **options)
    if to is not out:
        out.copy_(to)


@functools.cache
def compile_cubin(capability: int, dtype: str, head_dim: int) -> Cubin:
    """For an SM such as 89; dtype and head_dim as plan() takes them."""
    tile = plan(batch=1, heads=1, head_dim=head_dim, dtype=dtype)
    pointers = ("q", "k", "v", "out")
    signature = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys((*STRIDES, "num_heads", "n_tokens"), "i32")
    return cubin.compile_cubin(
        relu_linear_attention_kernel,
        capability,
        op=OP,
        signature=signature | {"eps": "fp32", "D": "constexpr", "BLOCK_N": "constexpr"},
        constants={"D": head_dim, "BLOCK_N": tile.block_n},
        aligned=(*pointers, *STRIDES),  # strides are multiples of D
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def compile_cubins(targets: Iterable[str], dtype: str, head_dim: int, eps: float = EPS) -> dict[str, str | bytes | float]:
    """Every attribute of a `sana::ReluLinearAttention` node for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of q, k, v and out; head_dim as plan() takes it. eps is read by the function body; the kernel's
    is in `launch`.
    """
    heads, tokens = ["dim", 0, 1], ["dim", 0, 2]
    head_stride = ["mul", tokens, head_dim]
    strides: list[list[Any]] = [["i32", ["mul", heads, head_stride]], ["i32", head_stride], ["i32", head_dim]]  # contiguous
    found = cubin.attributes(
        OP,
        targets,
        lambda capability: compile_cubin(capability, dtype, head_dim),
        inputs=[dtype] * 3,
        outputs=[Output(type=dtype, shape=[["dim", 0, axis] for axis in range(4)])],
        grid=[["mul", ["dim", 0, 0], heads], 1, 1],
        args=[["in", 0], ["in", 1], ["in", 2], ["out", 0], *strides, *strides, ["i32", heads], ["i32", tokens], ["f32", eps]],
    )
    return found | {"eps": eps}


def function_body(opset: int = 20) -> "onnx.FunctionProto":
    """The op in standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to v's type, whatever that is.

    Inputs q, k, v (B, H, N, D), output out. Attribute eps, EPS unless given; the plugin's attributes are allowed and unused.
    opset: of the standard operators, 18 or newer; it must equal the model's.
    """
    from onnx import TensorProto, helper

    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT))
    eps = helper.make_node("Constant", [], ["eps"])
    reference = helper.make_attribute("value_float", 0.0)
    reference.ClearField("f")
    reference.ref_attr_name = "eps"
    eps.attribute.append(reference)
    nodes += [
        helper.make_node("Relu", ["q_wide"], ["q_relu"]),
        helper.make_node("Relu", ["k_wide"], ["k_relu"]),
        helper.make_node("Transpose", ["k_relu"], ["k_transposed"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["k_transposed", "v_wide"], ["state"]),
        helper.make_node("Constant", [], ["tokens_axis"], value_ints=[3]),
        helper.make_node("ReduceSum", ["k_transposed", "tokens_axis"], ["z"], keepdims=1),
        helper.make_node("MatMul", ["q_relu", "state"], ["top"]),
        helper.make_node("MatMul", ["q_relu", "z"], ["bottom"]),
        eps,
        helper.make_node("Add", ["bottom", "eps"], ["bottom_eps"]),
        helper.make_node("Div", ["top", "bottom_eps"], ["wide"]),
        helper.make_node("CastLike", ["wide", "v"], ["out"]),
    ]
    return helper.make_function(
        DOMAIN,
        OP,
        ["q", "k", "v"],
        ["out"],
        nodes,
        [helper.make_opsetid("", opset)],
        attribute_protos=[
            helper.make_attribute(name, default)  # an attribute without a default would have to be on every node
            for name, default in (("eps", EPS), ("launch", ""), ("cubins", ""), ("plugin_version", ""), ("plugin_namespace", ""))
        ],
    )
