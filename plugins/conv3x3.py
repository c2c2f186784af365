"""3x3 convolutions with the channels last, alone or as the end of a residual block: Triton kernels, ONNX bodies, cubins.

Their meaning is in sana_ref/conv_ops.py:

    Conv3x3        y = activation(conv(x) + bias)
    Conv3x3Norm    y = residual + RMSNorm(conv(x)), the norm over all channels of a pixel

An implicit matrix product: pixels times channels out, summed over 9 taps times channels in, a block of one tap after the other. The
rows of the left factor are read where they lie, the picture moved by a tap, with zeros outside; no copy of the picture is made
(im2col would be nine of them). Triton turns this into Hopper's wgmma. The second op keeps all channels of its pixels in one
program, so that norm and residual cost no passes over memory but the reading of the residual.

Precision: sums, activation and norm in fp32, rounded once; SiLU that bf16 rounds is within 2**-12 |x|.

Dimensions: B pictures, h x w pixels, C channels in, N out. x (B, h, w, C), weight (N, 3, 3, C), y and residual (B, h, w, N), others
(N,). In a program M pixels, N channels out, K channels in at a time.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton

from plugins import cubin
from plugins.conv3x3_kernels import conv_kernel, norm_kernel
from plugins.cubin import Cubin
from plugins.launch import Output

if TYPE_CHECKING:
    import onnx
    import torch

OP, NORM = "Conv3x3", "Conv3x3Norm"
DOMAIN = "sana"
EPS = 1e-5  # as sana_ref.conv_ops.NORM_EPS; a test holds the two together
ACTIVATIONS = ("none", "relu", "silu")  # as sana_ref.conv_ops.ACTIVATIONS
INPUTS = {OP: ("x", "weight", "bias"), NORM: ("x", "weight", "residual", "norm_weight", "norm_bias")}

# Of a program; half precision is measured on an H200 with the sizes of DC-AE's decoder, fp32 and SMALL_BLOCK_K are reasoned. Beside
# cuDNN 9: 128 channels of 1024 px 0.54 ms to 0.77, 256 of 512 px 0.50 to 0.59, 512 of 256 px 0.42 to 0.48. Only BLOCK_K may depend
# on the GPU, because the cubins of a node share one grid: 64 where shared memory is large, else 32, for GPUs with 99 KiB a block.
# fp32 is multiplied without tensor cores, in unrolled code that a larger block would make too long.
BLOCK_M = {"fp16": 128, "bf16": 128, "fp32": 64}  # pixels
BLOCK_N = {"fp16": 256, "bf16": 256, "fp32": 64}  # channels out at most; of NORM all
BLOCK_K = {"fp16": 64, "bf16": 64, "fp32": 16}  # channels in at most
SMALL_BLOCK_K = {"fp16": 32, "bf16": 32, "fp32": 16}  # where shared memory is small
WIDE = 128 * 128  # sums of a program beyond which it has eight warps, not four: at just that many 0.67 ms instead of 0.54
NUM_STAGES = 3  # loads under way
GROUP_M = 8  # blocks of pixels whose programs run side by side over all channels, so that x comes from the L2 cache
MAX_NORM = 256  # N of NORM: 128 x 256 sums in fp32 fill half the registers of eight warps; on SM 90 its end, not its loop, spills
LEAST = 16  # the shortest side of a block that a tensor core takes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sides of a program's blocks, and its warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = NUM_STAGES

    def programs(self, op: str, pixels: Any, outputs: int) -> Any:
        """How many programs a picture has; pixels: a number, or an expression of plugins/launch.py, as then the result."""
        columns = 1 if op == NORM else -(-outputs // self.block_n)
        if isinstance(pixels, int):
            return -(-pixels // self.block_m) * columns
        return ["mul", ["ceildiv", pixels, self.block_m], columns]


def plan(op: str, capability: int, dtype: str, channels: int, outputs: int) -> Plan:
    """For an op made of `convolved`, an SM such as 89, C and N. block_m and block_n do not depend on the SM.

    Raises ValueError for a dtype that is not in plugins.cubin.TYPES, no channels, or more outputs of NORM than MAX_NORM.
    """
    cubin.check_type(op, dtype)
    if channels < 1 or outputs < 1:
        raise ValueError(f"{op}: got {channels} channels in, {outputs} out; expected some")
    block_m, block_k = BLOCK_M[dtype], (BLOCK_K if cubin.max_shared(capability) > cubin.MAX_SHARED else SMALL_BLOCK_K)[dtype]
    block_n = max(triton.next_power_of_2(outputs), LEAST)
    if op == NORM and outputs > MAX_NORM:
        raise ValueError(
            f"{op}: got {outputs} channels out; expected at most {MAX_NORM}, which one program holds. Use {OP} and a norm behind it"
        )
    if op != NORM:
        block_n = min(block_n, BLOCK_N[dtype])
    num_warps = 8 if block_m * block_n > WIDE else 4
    return Plan(
        block_m=block_m,
        block_n=block_n,
        block_k=min(block_k, max(triton.next_power_of_2(channels), LEAST)),
        num_warps=num_warps,
    )


def _constants(op: str, chosen: Plan, channels: int, outputs: int, activation: str) -> dict[str, Any]:
    """The constexpr arguments of a kernel. Raises ValueError for an activation that is not in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    sizes = {"C": channels, "N": outputs}
    blocks = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
    return sizes | blocks | ({"ACTIVATION": activation, "GROUP_M": GROUP_M} if op == OP else {})


def _launch(op: str, inputs: "tuple[torch.Tensor, ...]", y: "torch.Tensor", activation: str, *numbers: float) -> None:
    import torch

    x, weight, *others = inputs
    batch, height, width, outputs = y.shape
    channels = x.shape[-1]
    fits = x.shape == (batch, height, width, channels) and weight.shape == (outputs, 3, 3, channels)
    fits = fits and all(other.shape == (y.shape if other.ndim == 4 else (outputs,)) for other in others)
    if not fits or not all(t.is_contiguous() and t.dtype == y.dtype and t.device == y.device for t in inputs):
        seen = "; ".join(f"{tuple(t.shape)} strides {t.stride()} {t.dtype} {t.device}" for t in (*inputs, y))
        raise ValueError(
            f"{op}: got {', '.join(INPUTS[op])}, y {seen}; expected x (B, h, w, C), weight (N, 3, 3, C), y (B, h, w, N), vectors "
            "(N,), all contiguous, of one dtype and device"
        )
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(str(y.dtype), str(y.dtype))
    major, minor = torch.cuda.get_device_capability(y.device) if y.is_cuda else (8, 0)  # a CPU: Triton's interpreter
    chosen = plan(op, 10 * major + minor, dtype, channels, outputs)
    constants = _constants(op, chosen, channels, outputs, activation)
    if y.numel() == 0:
        return
    kernel = conv_kernel if op == OP else norm_kernel
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    kernel[chosen.programs(op, height * width, outputs), batch](*inputs, y, height, width, *numbers, **constants, **options)


def launch(x: "torch.Tensor", weight: "torch.Tensor", bias: "torch.Tensor", y: "torch.Tensor", activation: str = "none") -> None:
    """Write the convolution's result into y (B, h, w, N). All contiguous, one dtype of fp16, bf16, fp32, on the current GPU.

    Raises ValueError unless that holds, the shapes fit, and activation is one of ACTIVATIONS.
    """
    _launch(OP, (x, weight, bias), y, activation)


def launch_norm(
    x: "torch.Tensor",
    weight: "torch.Tensor",
    residual: "torch.Tensor",
    norm_weight: "torch.Tensor",
    norm_bias: "torch.Tensor",
    y: "torch.Tensor",
    eps: float = EPS,
) -> None:
    """Write residual + RMSNorm(conv(x)) into y (B, h, w, N). As `launch`; also raises ValueError for N above MAX_NORM."""
    _launch(NORM, (x, weight, residual, norm_weight, norm_bias), y, "none", eps)


@functools.cache
def compile_cubin(op: str, capability: int, dtype: str, channels: int, outputs: int, activation: str = "none") -> Cubin:
    """For OP or NORM and an SM such as 89. channels: C; outputs: N."""
    chosen = plan(op, capability, dtype, channels, outputs)
    constants = _constants(op, chosen, channels, outputs, activation)
    pointers = (*INPUTS[op], "y")
    numbers = dict.fromkeys(("height", "width"), "i32") | ({"eps": "fp32"} if op == NORM else {})
    return cubin.compile_cubin(
        conv_kernel if op == OP else norm_kernel,
        capability,
        op=op,
        signature=dict.fromkeys(pointers, f"*{dtype}") | numbers | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=pointers,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def compile_cubins(
    op: str,
    targets: Iterable[str],
    dtype: str,
    channels: int,
    outputs: int,
    *,
    activation: str = "none",
    eps: float = EPS,
) -> dict[str, str | bytes | float]:
    """Every attribute of a node of OP or NORM for the GPU architectures `targets` ("sm80", "sm89", ...).

    dtype "fp16", "bf16" or "fp32" of all tensors; channels: C; outputs: N; activation: of OP, eps: of NORM, which the function
    bodies read. Raises ValueError as `plan` does, and for an activation that is not in ACTIVATIONS.
    """
    targets = list(targets)
    chosen = plan(op, min(cubin.CAPABILITIES), dtype, channels, outputs)  # of which only what all have in common is used
    batch, height, width = (["dim", 0, axis] for axis in range(3))
    found = cubin.attributes(
        op,
        targets,
        lambda capability: compile_cubin(op, capability, dtype, channels, outputs, activation),
        inputs=[dtype] * len(INPUTS[op]),
        outputs=[Output(type=dtype, shape=[batch, height, width, outputs])],
        grid=[chosen.programs(op, ["mul", height, width], outputs), batch, 1],
        args=[
            *(["in", index] for index in range(len(INPUTS[op]))),
            ["out", 0],
            ["i32", height],
            ["i32", width],
            *([["f32", eps]] if op == NORM else []),
        ],
    )
    return found | ({"activation": activation} if op == OP else {"eps": eps})


def norm_nodes(x: str) -> "list[onnx.NodeProto]":
    """Of a function body: x to `normed`, its RMSNorm over the last axis, by norm_weight_wide, norm_bias_wide and attribute eps."""
    from onnx import AttributeProto, helper

    eps = helper.make_node("Constant", [], ["eps"])
    eps.attribute.append(AttributeProto(name="value_float", type=AttributeProto.FLOAT, ref_attr_name="eps"))
    return [
        eps,
        helper.make_node("Mul", [x, x], ["square"]),
        helper.make_node("Constant", [], ["channels_axis"], value_ints=[-1]),
        helper.make_node("ReduceMean", ["square", "channels_axis"], ["mean"], keepdims=1),
        helper.make_node("Add", ["mean", "eps"], ["mean_eps"]),
        helper.make_node("Sqrt", ["mean_eps"], ["root"]),
        helper.make_node("Div", [x, "root"], ["scaled"]),
        helper.make_node("Mul", ["scaled", "norm_weight_wide"], ["weighted"]),
        helper.make_node("Add", ["weighted", "norm_bias_wide"], ["normed"]),
    ]


def function_body(op: str, opset: int = 20) -> "onnx.FunctionProto":
    """OP or NORM in standard ONNX operators, for every reader that has no plugin: fp32 inside, cast back to x's type.

    Inputs as INPUTS, output out. Attributes activation (of OP) or eps (of NORM); the plugin's are allowed and unused. opset: of the
    standard operators, 19 or newer, which compares strings; it must equal the model's.
    """
    from onnx import AttributeProto, TensorProto, helper

    def from_attribute(name: str, field: str, kind: "AttributeProto.AttributeType") -> "onnx.NodeProto":
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(AttributeProto(name=field, type=kind, ref_attr_name=name))
        return node

    def node(kind: str, inputs: str, output: str, **attributes: object) -> "onnx.NodeProto":
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    def chosen(activation: str) -> "list[onnx.NodeProto]":
        """A boolean: a function has no branch on an attribute, so all activations are computed and one is taken."""
        return [
            helper.make_node("Constant", [], [f"{activation}_name"], value_string=activation),
            node("Equal", f"activation {activation}_name", f"is_{activation}"),
        ]

    nodes = [
        *(node("Cast", name, f"{name}_wide", to=TensorProto.FLOAT) for name in INPUTS[op]),
        node("Transpose", "x_wide", "x_first", perm=[0, 3, 1, 2]),
        node("Transpose", "weight_wide", "weight_first", perm=[0, 3, 1, 2]),
        node("Conv", "x_first weight_first" + (" bias_wide" if op == OP else ""), "conv_first", pads=[1, 1, 1, 1]),
        node("Transpose", "conv_first", "conv", perm=[0, 2, 3, 1]),
    ]
    defaults: dict[str, Any] = {"launch": "", "cubins": "", "plugin_version": "", "plugin_namespace": ""}
    if op == OP:
        defaults["activation"] = "none"
        nodes += [
            from_attribute("activation", "value_string", AttributeProto.STRING),
            *chosen("relu"),
            *chosen("silu"),
            node("Relu", "conv", "relu"),
            node("Sigmoid", "conv", "sigmoid"),
            node("Mul", "conv sigmoid", "silu"),
            node("Where", "is_relu relu conv", "relu_or_none"),
            node("Where", "is_silu silu relu_or_none", "y"),
        ]
    else:
        defaults["eps"] = EPS
        nodes += [
            *norm_nodes("conv"),
            node("Add", "residual_wide normed", "y"),
        ]
    return helper.make_function(
        DOMAIN,
        op,
        list(INPUTS[op]),
        ["out"],
        [*nodes, node("CastLike", "y x", "out")],
        [helper.make_opsetid("", opset)],
        attribute_protos=[helper.make_attribute(name, default) for name, default in defaults.items()],
    )
