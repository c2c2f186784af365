"""FP8 and INT8 convolutions in a decoder's graph: which nodes, which bits, and what they compute beside PyTorch's simulation."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from parity.bound import assert_parity
from tiny_build import component, runner
from torch import nn
from torch.nn import functional as F

from engines.spec import Precision, Target
from export.linear_nodes import use_linear_plugins
from export.plugin_nodes import add_cubins, has_kernel
from export.quantized_constants import DATA_NAME, Constants
from export.quantized_conv_nodes import use_quantized_convs
from export.stages import _beside
from export.weights import DATA_NAME as WEIGHTS_NAME
from plugins.eight_bits import KINDS, LARGEST
from plugins.launch import Launch
from plugins.static_scale import OUT_SCALE
from sana_ref import conv_ops, fused_decoder
from sana_ref.autoencoder import ResBlock
from sana_ref.quantization import LayerPlan, QuantizationPlan
from sana_ref.quantize_ops import quantize_weight
from sana_ref.quantized_convs import MARGINS, ConvRanges, QuantizedConvs, conv_group, conv_groups, conv_plan

C = 24
GROUPS = [f"up_blocks.0.{block}.conv{conv}" for block in range(2) for conv in (1, 2)]


class Chain(nn.Module):
    """Two residual blocks, as a stage of a fused decoder runs them. x and result: (B, h, w, C)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up_blocks = nn.ModuleList([nn.ModuleList([ResBlock(C, "silu"), ResBlock(C, "relu")])])
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 0.5, 0.2)
            elif (
                "conv1" in name
            ):  # far from where SiLU is a line: a factor, which the norm would take out again, makes a difference
                nn.init.normal_(parameter, 0.0, 2.0 if "bias" in name else 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.up_blocks[0]:
            x = fused_decoder._block(block, x)
        return x


@pytest.fixture
def wide(request, monkeypatch):
    """Whether the chain counts as one of more than MAX_NORM channels, whose norm is TensorRT's."""
    if request.param:
        monkeypatch.setattr(fused_decoder, "MAX_NORM", C - 1)
    return request.param


def chain(kind="fp8"):
    """It in fp16, an input, and a plan from the ranges."""
    module = Chain().half().eval().requires_grad_(False)
    x = torch.randn(2, 9, 7, C, generator=torch.Generator().manual_seed(1)).half()
    with torch.inference_mode(), ConvRanges(module) as found:
        module(x)
    return module, x, conv_plan(kind, found.largest(), MARGINS[kind])


def graph_of(module, *, wide, outputs=("y",)):
    """As export makes it: weights as they are stored, with a Transpose behind."""
    nodes, constants, types = [], [], {}

    def constant(name, tensor):
        constants.append(numpy_helper.from_array(tensor.numpy(), name))
        types[name] = [*tensor.shape]
        return name

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        types.setdefault(output, ["b", "h", "w", C])
        return output

    def weight(block, conv):
        name = f"decoder.up_blocks.0.{block}.conv{conv}.weight"
        stored = constant(name, module.get_parameter(name.removeprefix("decoder.")))
        types[f"w{block}{conv}"] = [C, 3, 3, C]
        return node("Transpose", [stored], f"w{block}{conv}", perm=[0, 2, 3, 1])

    x = "x"
    for index, block in enumerate(module.up_blocks[0]):
        last = "y" if index == 1 else f"y{index}"
        bias = constant(f"b{index}", block.conv1.bias)
        options = {"domain": "sana", "activation": ("silu", "relu")[index]}
        middle = node("Conv3x3", [x, weight(index, 1), bias], f"middle{index}", **options)
        gain, shift = (constant(f"norm{index}.{kind}", getattr(block.norm, kind)) for kind in ("weight", "bias"))
        if wide:
            none = constant(f"zero{index}", torch.zeros(C).half())
            conv = node("Conv3x3", [middle, weight(index, 2), none], f"conv{index}", domain="sana", activation="none")
            normed = node(
                "Add", [node("RMSNormalization", [conv, gain], f"rms{index}", epsilon=block.norm.eps), shift], f"n{index}"
            )
            x = node("Add", [x, normed], last)
        else:
            inputs = [middle, weight(index, 2), x, gain, shift]
            x = node("Conv3x3Norm", inputs, last, domain="sana", eps=block.norm.eps)

    def info(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, types[name])

    types["x"] = ["b", "h", "w", C]
    graph = helper.make_graph(nodes, "chain", [info("x")], [info(name) for name in outputs], constants)
    graph.value_info.extend(info(name) for name in types if name not in ("x", *outputs))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("sana", 1)])


def bits_of(kind, real, scale):
    scaled = (real / scale).clamp(-LARGEST[kind], LARGEST[kind])
    return scaled.float().to(torch.float8_e4m3fn).view(torch.int8) if kind == "fp8" else scaled.round().to(torch.int8)


def evaluate(model, folder, x, kind="fp8"):
    """Every tensor of a graph of these ops, in fp64 between roundings to fp16 or bits of `kind`."""
    graph = Constants(model.graph, folder)
    found = {"x": x} | {name: torch.from_numpy(np.array(graph.value(name))) for name in graph.constants}
    for node in model.graph.node:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        inputs = [found[name] for name in node.input]
        fp8 = [kind == "fp8" and each.dtype == torch.int8 for each in inputs]
        real = [(each.view(torch.float8_e4m3fn) if bits else each).double() for each, bits in zip(inputs, fp8, strict=True)]
        scale = given.get(OUT_SCALE)
        if node.op_type == "Transpose":
            results = [inputs[0].permute(given["perm"]).contiguous()]
        elif node.op_type == "Add":
            results = [(real[0] + real[1]).half()]
        elif node.op_type == "RMSNormalization":
            results = [F.rms_norm(real[0], (C,), real[1], given["epsilon"]).half()]
        elif node.op_type.endswith("StaticQuantize"):
            results = [bits_of(kind, real[0], given["scale"])]
        else:
            scales, *rest = real[2:] if inputs[0].dtype == torch.int8 else (1.0, *real[2:])
            conv = F.conv2d(real[0].permute(0, 3, 1, 2), real[1].permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1) * scales
            if node.op_type.endswith("Norm"):
                y = rest[0] + F.rms_norm(conv, (C,), rest[1], given["eps"]) + rest[2]
                results = [y.half()] if scale is None else [y.half(), bits_of(kind, y, scale)]
            else:
                y = conv_ops.ACTIVATIONS[given["activation"].decode()](conv + rest[0])
                results = [y.half() if scale is None else bits_of(kind, y, scale)]
        found |= dict(zip(node.output, results, strict=True))
    return found


def check(model, folder):
    """That nothing reads what comes later, and constants are where they are said to be."""
    onnx.save(model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))


def outline(model):
    """Op, input, outputs and scale of each node of ours, in order."""
    return [
        (node.op_type, node.input[0], *node.output, any(a.name == OUT_SCALE for a in node.attribute))
        for node in model.graph.node
        if node.domain == "sana"
    ]


FUSED = [
    ("Fp8StaticQuantize", "x", "x_bits", False),
    ("Fp8Conv3x3", "x_bits", "middle0_bits", True),
    ("Fp8Conv3x3Norm", "middle0_bits", "y0", "y0_bits", True),
    ("Fp8Conv3x3", "y0_bits", "middle1_bits", True),
    ("Fp8Conv3x3Norm", "middle1_bits", "y", False),
]
WIDE = [
    ("Fp8StaticQuantize", "x", "x_bits", False),
    ("Fp8Conv3x3", "x_bits", "middle0_bits", True),
    ("Fp8Conv3x3", "middle0_bits", "conv0", False),
    ("Fp8StaticQuantize", "y0", "y0_bits", False),
    ("Fp8Conv3x3", "y0_bits", "middle1_bits", True),
    ("Fp8Conv3x3", "middle1_bits", "conv1", False),
]


def of_kind(kind, name):
    return name.replace("Fp8", {"fp8": "Fp8", "int8": "Int8"}[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True], indirect=True, ids=["fused", "wide"])
def test_a_chain(tmp_path, wide, kind):
    """The kernel that makes a picture quantises it, else a pass; the result errs as the simulation does."""
    module, x, plan = chain(kind)
    model = graph_of(module, wide=wide)
    counts = use_quantized_convs(model, tmp_path, plan)
    check(model, tmp_path)
    assert outline(model) == [(of_kind(kind, op), *rest) for op, *rest in (WIDE if wide else FUSED)]
    norms = {} if wide else {"Conv3x3Norm": -2, "Fp8Conv3x3Norm": 2}
    convs = 4 if wide else 2
    expected = {"Fp8StaticQuantize": 1 + wide, "Conv3x3": -convs, "Fp8Conv3x3": convs} | norms
    assert counts == {of_kind(kind, op): count for op, count in expected.items()}
    exact = module.double()(x.double())
    module.half()
    with torch.inference_mode(), QuantizedConvs(module, plan):
        same = module(x)
    assert_parity(evaluate(model, tmp_path, x, kind)["y"], same=same, exact=exact, name="chain")
    planted = [
        attribute
        for node in model.graph.node
        for attribute in node.attribute
        # of a first convolution's input: what the second reads may have any factor, which the norm takes out again
        if attribute.name in ("scale", OUT_SCALE) and not node.output[0].startswith("middle")
    ]
    assert len(planted) == 2
    for attribute in planted:
        attribute.f *= 2
        with pytest.raises(AssertionError, match="expected at most"):
            assert_parity(evaluate(model, tmp_path, x, kind)["y"], same=same, exact=exact, name="chain")
        attribute.f /= 2


@pytest.mark.parametrize("kept", [GROUPS[:1], GROUPS[1:2], GROUPS[2:3], GROUPS[3:], GROUPS[:3]], ids=str)
def test_convolutions_that_stay(tmp_path, kept):
    """A kernel quantises only what an FP8 convolution reads."""
    module, x, plan = chain()
    plan = plan.model_copy(update={"layers": plan.layers | {group: LayerPlan(format="none") for group in kept}})
    model = graph_of(module, wide=False)
    counts = use_quantized_convs(model, tmp_path, plan)
    check(model, tmp_path)
    assert counts.get("Fp8Conv3x3", 0) + counts.get("Fp8Conv3x3Norm", 0) == 4 - len(kept)
    with torch.inference_mode(), QuantizedConvs(module, plan):
        same = module(x)
    exact = module.double()(x.double())
    assert_parity(evaluate(model, tmp_path, x)["y"], same=same, exact=exact, name="chain")
    made = {name for node in model.graph.node if node.domain == "sana" for name in node.output if name.endswith("_bits")}
    assert made == {name for node in model.graph.node for name in node.input if name in made}


def test_a_result_that_others_read(tmp_path):
    """The first convolution's is an output as well: it stays, and a pass makes the bits."""
    module, x, plan = chain()
    model = graph_of(module, wide=False, outputs=("y", "middle0"))
    assert use_quantized_convs(model, tmp_path, plan)["Fp8StaticQuantize"] == 2
    assert evaluate(model, tmp_path, x)["middle0"].dtype == torch.float16


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            {"up_blocks.0.2.conv1": LayerPlan(format="fp8", input_scale=1.0)},
            r"got fp8, up_blocks.0.2.conv1; .* up_blocks.0.0.conv1, ",
        ),
        ({GROUPS[0]: LayerPlan(format="fp8")}, "got fp8, up_blocks.0.0.conv1; expected fp8 or int8, and an input_scale"),
        ({GROUPS[0]: LayerPlan(format="nvfp4", input_scale=1.0)}, "got nvfp4; expected fp8 or int8"),
        (
            {group: LayerPlan(format=kind, input_scale=1.0) for group, kind in zip(GROUPS, KINDS, strict=False)},
            "got fp8, int8; expected fp8 or int8",
        ),
    ],
)
def test_plans_that_do_not_fit(tmp_path, layers, words):
    with pytest.raises(ValueError, match=words):
        use_quantized_convs(graph_of(Chain().half().requires_grad_(False), wide=False), tmp_path, QuantizationPlan(layers=layers))


@pytest.fixture(scope="module", params=KINDS)
def decoder(request, tmp_path_factory):
    """The format, the small decoder's graph, as for sm90, its folder, the plan, and how many nodes were said to be added."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    found = component("decoder", Precision(kind))
    graphs = runner().export(found)
    model = onnx.load(graphs.folder / "typed.onnx", load_external_data=False)
    assert use_linear_plugins(model)
    groups = conv_groups(name for name, _ in found.module.named_parameters())
    plan = conv_plan(kind, {group: 4.0 + index for index, group in enumerate(groups)}, MARGINS[kind])
    with _beside(graphs.folder / WEIGHTS_NAME, folder):
        counts = use_quantized_convs(model, folder, plan)
    return kind, model, folder, plan, counts


@pytest.mark.slow
def test_a_decoder(decoder):
    """Four stages of one residual block; the first convolution of all, and those that upsample, stay."""
    kind, model, folder, plan, counts = decoder
    assert len(plan.layers) == 8
    expected = {"Fp8StaticQuantize": 4, "Conv3x3": -4, "Fp8Conv3x3": 4, "Conv3x3Norm": -4, "Fp8Conv3x3Norm": 4}
    assert counts == {of_kind(kind, op): count for op, count in expected.items()}
    found = Counter(node.op_type for node in model.graph.node if node.domain == "sana")
    assert {op: found[op] for op in counts} == {op: max(count, 0) for op, count in counts.items()} | {"Conv3x3": 1}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    load = runner().loader(component("decoder", Precision(kind)))
    weight = load("decoder.up_blocks.1.1.conv2.weight").bfloat16().permute(0, 2, 3, 1).flatten(1)
    made = quantize_weight(weight, kind, "weight")
    node = next(
        node
        for node in model.graph.node
        if node.op_type == of_kind(kind, "Fp8Conv3x3Norm") and node.input[4] == "decoder.up_blocks.1.1.norm.weight"
    )
    where = {entry.key: entry.value for entry in constants[node.input[1]].external_data}
    assert where["location"] == DATA_NAME
    data = (folder / DATA_NAME).read_bytes()[int(where["offset"]) :][: int(where["length"])]
    assert data == made.numbers.view(torch.uint8).numpy().tobytes()
    input_scale = np.float32(plan.layers["up_blocks.1.1.conv2"].input_scale)
    np.testing.assert_array_equal(numpy_helper.to_array(constants[node.input[2]]), input_scale * made.scale.numpy())


@pytest.mark.slow
def test_cubins_of_a_decoder(decoder):
    """Each node has its kernel, with its scale."""
    model = onnx.ModelProto()
    model.CopyFrom(decoder[1])
    assert add_cubins(model, (Target.SM90,)) == sum(map(has_kernel, model.graph.node))
    for node in model.graph.node:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type.startswith(of_kind(decoder[0], "Fp8")):
            launch = Launch.from_json(given["launch"])
            assert launch.inputs[0] == ("bf16" if node.op_type.endswith("StaticQuantize") else "int8")
            assert len(launch.outputs) == len(node.output)
            scale = given.get(OUT_SCALE, given.get("scale"))
            assert (scale is not None) == (["f32", scale] in launch.args)


def test_groups():
    assert conv_group("decoder.up_blocks.2.1.conv1.weight") == "up_blocks.2.1.conv1"
    others = ("up_blocks.2.0.conv", "conv_in", "conv_out", "up_blocks.5.0.conv_out.conv_inverted", "down_blocks.1.0.conv1")
    assert [conv_group(f"decoder.{name}.weight") for name in others] == [None] * len(others)
    assert conv_group("up_blocks.2.1.conv1.bias") is None
