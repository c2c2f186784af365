"""FP8 layers in a graph for TensorRT: which nodes, and which bits."""

from collections import Counter
from types import MappingProxyType

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny_build import component, runner

from engines.errors import SpecError
from engines.spec import Precision, Target, check_precision, component_precision
from export.fp8_nodes import DATA_NAME, QUANTIZED, use_fp8
from export.linear_nodes import use_linear_plugins
from export.plugin_nodes import add_cubins
from export.stages import _beside
from export.weights import DATA_NAME as WEIGHTS_NAME
from plugins.launch import Launch
from plugins.static_scale import OUT_SCALE
from sana_ref.fp8 import quantize_rows
from sana_ref.quantization import LayerPlan, QuantizationPlan, groups_of
from sana_ref.transformer import GATE_ATTN


def plan(scales=MappingProxyType({}), *, kept=()):
    """All groups of the model's one block in fp8, but those that are kept."""
    groups = {*groups_of(dict(component("denoiser", Precision.FP8).module.named_parameters())), *scales} - {*kept}
    return QuantizationPlan(layers={group: LayerPlan(format="fp8", input_scale=scales.get(group)) for group in sorted(groups)})


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The graph, its folder, and how many nodes were said to be added."""
    folder = tmp_path_factory.mktemp("fp8")
    graphs = runner().export(component("denoiser", Precision.FP8))
    model = onnx.load(graphs.folder / "typed.onnx", load_external_data=False)
    use_linear_plugins(model)
    with _beside(graphs.folder / WEIGHTS_NAME, folder):
        counts = use_fp8(model, folder, plan())
    return model, folder, counts


@pytest.mark.slow
def test_nodes(quantized):
    """One block has six layers. The norm before the mix-FFN quantises, and so does the sum before the text's attention; the first
    norm is no plugin, the last has no FP8 layer."""
    model, _, counts = quantized
    found = Counter(node.op_type for node in model.graph.node if node.domain == "sana")
    assert counts == {"Fp8GatedSum": 1, "Fp8Linear": 6, "Fp8Quantize": 4}
    assert {op: found[op] for op in counts} == counts
    assert found["Linear"] == 4  # of the time, and the last one
    norms = {node.op_type: node for node in model.graph.node if node.op_type.endswith("ModulatedNorm")}
    assert [len(norms[op].output) for op in ("ModulatedNorm", "GatedModulatedNorm")] == [3, 2]
    assert [any(a.name == QUANTIZED for a in norms[op].attribute) for op in ("ModulatedNorm", "GatedModulatedNorm")] == [
        True,
        False,
    ]
    (gated,) = (node for node in model.graph.node if node.op_type == "Fp8GatedSum")
    assert gated.input[3] == "transformer.transformer_blocks.0.scale_shift_table"
    assert helper.get_node_attr_value(gated, "row") == GATE_ATTN
    assert gated.output[0] in norms["ModulatedNorm"].input
    made = {name for node in model.graph.node for name in node.output}
    made |= {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:  # in order: nothing reads what comes later
        assert {name for name in node.input if name} <= made


@pytest.mark.slow
def test_weights(quantized):
    """Bits and scales are those of the rows of the checkpoint's weights, joined where layers are."""
    model, folder, _ = quantized
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    load = runner().loader(component("denoiser", Precision.FP8))
    name = "transformer.transformer_blocks.0.attn2.to_q.weight"
    bits, scale = quantize_rows(load(name).half())
    where = {entry.key: entry.value for entry in constants[f"{name}_bits"].external_data}
    assert where["location"] == DATA_NAME
    data = (folder / DATA_NAME).read_bytes()[int(where["offset"]) :][: int(where["length"])]
    assert data == bits.view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(numpy_helper.to_array(constants[f"{name}_scale"]), scale.numpy())
    joined = next(node for node in model.graph.node if node.op_type == "Fp8Linear").input[1]
    width = load(name).shape[0]
    assert list(constants[joined].dims) == [3 * width, width]


@pytest.mark.slow
def test_cubins(quantized):
    model = onnx.ModelProto()
    model.CopyFrom(quantized[0])
    assert add_cubins(model, (Target.SM90,)) == 6 + 5


SCALES = {
    "transformer_blocks.0.attn1.to_out.0": 0.5,
    "transformer_blocks.0.attn2.to_out.0": 0.25,
    "transformer_blocks.0.ff.conv_point": 2.0,
}
MAKERS = dict(zip(SCALES, ("LinearAttentionApply", "CrossAttention", "GatedDepthwiseConv"), strict=True))


def with_scales(folder, scales, kept=()):
    graphs = runner().export(component("denoiser", Precision.FP8))
    model = onnx.load(graphs.folder / "typed.onnx", load_external_data=False)
    use_linear_plugins(model)
    with _beside(graphs.folder / WEIGHTS_NAME, folder):
        return model, use_fp8(model, folder, plan(scales, kept=kept))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [[*SCALES], [*SCALES][1:2]], ids=len)
def test_given_scales(tmp_path, groups):
    """Kernels quantise what they make with it; without one the pass of before stays."""
    model, counts = with_scales(tmp_path, {group: SCALES[group] for group in groups})
    assert counts == {"Fp8GatedSum": 1, "Fp8Linear": 6, "Fp8Quantize": 4 - len(groups)}
    nodes = {node.op_type: node for node in model.graph.node}
    for group, op in MAKERS.items():
        given = [a.f for a in nodes[op].attribute if a.name == OUT_SCALE]
        assert given == ([SCALES[group]] if group in groups else [])
        assert len(nodes[op].output) == (2 if group in groups else 1)
        readers = [node for node in model.graph.node if nodes[op].output[0] in node.input]
        if group in groups:
            (reader,) = readers
            assert (reader.op_type, reader.input[0], reader.input[2]) == ("Fp8Linear", *nodes[op].output)
    made = {name for node in model.graph.node for name in node.output}
    made |= {value.name for value in (*model.graph.input, *model.graph.initializer)}
    assert all(name in made for node in model.graph.node for name in node.input if name)
    assert add_cubins(model, (Target.SM90,)) == 6 + 5 - len(groups)
    launches = {
        node.op_type: Launch.from_json(helper.get_node_attr_value(node, "launch")) for node in model.graph.node if node.domain
    }
    for group, op in MAKERS.items():
        assert (["f32", SCALES[group]] in launches[op].args) == (group in groups)


@pytest.mark.slow
def test_groups_that_stay(tmp_path):
    """The convolution's output is read in fp16, and q, k and v's projection is no FP8 layer."""
    kept = ["transformer_blocks.0.attn1.to_qkv", "transformer_blocks.0.ff.conv_point"]
    model, counts = with_scales(tmp_path, {group: SCALES[group] for group in SCALES if group not in kept}, kept)
    assert counts == {"Fp8GatedSum": 1, "Fp8Linear": 4}
    found = Counter(node.op_type for node in model.graph.node if node.domain == "sana")
    assert found["Linear"] == 6
    (conv,) = (node for node in model.graph.node if node.op_type == "GatedDepthwiseConv")
    assert len(conv.output) == 1


@pytest.mark.slow
def test_scales_that_no_kernel_takes(tmp_path):
    wrong = {"transformer_blocks.0.attn1.to_qkv": 1.0, "transformer_blocks.7.ff.conv_point": 1.0}
    with pytest.raises(
        ValueError, match=r"input_scales: got transformer_blocks.0.attn1.to_qkv, transformer_blocks.7.ff.conv_point;"
    ):
        with_scales(tmp_path, SCALES | wrong)


def test_where_it_is_built():
    assert component_precision(Precision.FP8) == {
        "text_encoder": Precision.BF16,
        "text_projection": Precision.FP16,
        "denoiser": Precision.FP8,
        "decoder": Precision.BF16,
    }
    check_precision(Precision.FP8, [Target.SM90])
    check_precision(Precision.FP16, [Target.SM80, Target.SM120])
    with pytest.raises(SpecError, match=r"precision: got fp8 for sm89, sm90; expected sm90 alone"):
        check_precision(Precision.FP8, [Target.SM89, Target.SM90])
