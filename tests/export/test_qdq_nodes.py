"""Quantised graphs: what is in them, and that ONNX Runtime computes what the simulation does."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from quantized_denoiser import cases, denoiser, exported, graphs, plan, simulated
from tiny_build import runner

from engines.errors import SpecError
from engines.golden import Golden
from engines.parity_report import measure
from export.parity import run_onnxruntime
from export.qdq_nodes import quantize_graph
from export.weights import PORTABLE_NAME, TYPED_NAME
from sana_ref.quantization import QuantizationPlan, groups_of

PLANS = ("int8", "fp8", "nvfp4", "int8 a token", "fp8 a token")
OUT = "transformer_blocks.0.attn1.to_out.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_onnxruntime_computes_the_simulation(name):
    """The graph is fp32 between the products. It may be off the simulation with fp64 there by twice what that with fp32 is.

    A number that is rounded to the wrong neighbour costs a thousand times as much, so none is.
    """
    exact = simulated(plan(name), torch.float64)
    same = simulated(plan(name), torch.float32)
    golden = {
        case: Golden(inputs={name: array.astype(np.float32) for name, array in inputs.items()}, outputs={})
        for case, inputs in cases().items()
    }
    got = run_onnxruntime(graphs(name) / PORTABLE_NAME, golden, frugal=False)

    def largest(outputs):
        return max(measure(outputs[case][output], exact[case][output]).rms for case in exact for output in exact[case])

    assert largest(got) <= 2 * largest(same)


def nodes(name: str, file: str = TYPED_NAME) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(graphs(name) / file, load_external_data=False).graph.node)


def initializers(name: str, file: str = TYPED_NAME) -> dict[str, onnx.TensorProto]:
    return {each.name: each for each in onnx.load(graphs(name) / file, load_external_data=False).graph.initializer}


@pytest.mark.slow
def test_nodes():
    """Six groups a block: each has a DequantizeLinear for weights and one for activations, NVFP4 two."""
    for kind in ("int8", "fp8"):
        assert (nodes(kind)["QuantizeLinear"], nodes(kind)["DequantizeLinear"]) == (6, 12)
        assert not nodes(f"{kind} a token")["QuantizeLinear"]
    found = nodes("nvfp4")
    assert (found["TRT_FP4DynamicQuantize"], found["DequantizeLinear"], found["QuantizeLinear"]) == (6, 24, 0)
    portable = nodes("nvfp4", PORTABLE_NAME)
    assert (portable["Nvfp4Weight"], portable["Nvfp4Round"]) == (6, 6)
    assert not portable["TRT_FP4DynamicQuantize"] + portable["DequantizeLinear"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_weights_are_stored_narrow(name):
    """No weight of a planned group is left in 16 bits; both graphs read the same bytes."""
    width, kind = {
        "int8": (1, onnx.TensorProto.INT8),
        "fp8": (1, onnx.TensorProto.FLOAT8E4M3FN),
        "nvfp4": (0.5, onnx.TensorProto.FLOAT4E2M1),
    }[name.split()[0]]
    typed, portable = initializers(name), initializers(name, PORTABLE_NAME)
    assert not groups_of(typed)
    shapes = dict(denoiser().module.named_parameters())
    for group, parts in groups_of(shapes).items():
        tensor = typed[f"transformer.{group}.weight_numbers"]
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert tensor.data_type == kind
        assert int(place["length"]) == width * sum(shapes[part].numel() for part in parts)
        suffix = "_packed" if name == "nvfp4" else ""
        same = {entry.key: entry.value for entry in portable[f"transformer.{group}.weight_numbers{suffix}"].external_data}
        assert same == place


@pytest.mark.slow
def test_a_group_that_is_not_planned_stays():
    made = plan("int8")
    some = made.model_copy(update={"layers": {OUT: made.layers[OUT]}, "tensors": {}})
    model = exported().clone()
    quantize_graph(model, some, runner().loader(denoiser()), torch.float16)
    names = set(model.graph.initializers)
    assert f"transformer.{OUT}.weight_numbers" in names
    assert len(groups_of(names)) == 5
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1


@pytest.mark.slow
def test_a_plan_of_another_model():
    layers = {"transformer_blocks.7.ff.conv_point": plan("int8").layers[OUT]}
    with pytest.raises(SpecError, match=r"got the group 'transformer_blocks\.7\.ff\.conv_point'; did you mean"):
        quantize_graph(exported().clone(), QuantizationPlan(layers=layers), runner().loader(denoiser()), torch.float16)
