"""FP8 layers in a graph for TensorRT: which nodes, and which bits."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_build import component, runner

from engines.errors import SpecError
from engines.spec import Precision, Target, check_precision, component_precision
from export.fp8_nodes import DATA_NAME, QUANTIZED, use_fp8
from export.linear_nodes import use_linear_plugins
from export.plugin_nodes import add_cubins
from export.stages import _beside
from export.weights import DATA_NAME as WEIGHTS_NAME
from sana_ref.fp8 import quantize_rows


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The graph, its folder, and how many nodes were said to be added."""
    folder = tmp_path_factory.mktemp("fp8")
    graphs = runner().export(component("denoiser", Precision.FP8))
    model = onnx.load(graphs.folder / "typed.onnx", load_external_data=False)
    use_linear_plugins(model)
    with _beside(graphs.folder / WEIGHTS_NAME, folder):
        counts = use_fp8(model, folder)
    return model, folder, counts


def test_nodes(quantized):
    """One block has six layers. The norm before the mix-FFN quantises; the first norm is no plugin, the last has no FP8 layer."""
    model, _, counts = quantized
    found = Counter(node.op_type for node in model.graph.node if node.domain == "sana")
    assert counts == {"Fp8Linear": 6, "Fp8Quantize": 5}
    assert {op: found[op] for op in counts} == counts
    assert found["Linear"] == 4  # of the time, and the last one
    norms = {node.op_type: node for node in model.graph.node if node.op_type.endswith("ModulatedNorm")}
    assert [len(norms[op].output) for op in ("ModulatedNorm", "GatedModulatedNorm")] == [3, 2]
    assert [any(a.name == QUANTIZED for a in norms[op].attribute) for op in ("ModulatedNorm", "GatedModulatedNorm")] == [
        True,
        False,
    ]
    made = {name for node in model.graph.node for name in node.output}
    made |= {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:  # in order: nothing reads what comes later
        assert {name for name in node.input if name} <= made


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


def test_cubins(quantized):
    model = onnx.ModelProto()
    model.CopyFrom(quantized[0])
    assert add_cubins(model, (Target.SM90,)) == 6 + 5


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
