import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from export_toy import CHANNELS, SPEC, Toy, inputs
from torch import nn

from engines.errors import BuildError, CheckpointError
from export.onnx_export import ExportSpec, count_plugin_nodes, export_module, with_function_bodies
from export.weights import DATA_NAME, parameter_names, write_weights
from export.widen import widened

pytestmark = pytest.mark.slow
HALF = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}


def meta_toy(dtype: torch.dtype) -> Toy:
    with torch.device("meta"):
        return Toy().to(dtype)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Toy().state_dict()


@functools.cache
def exported_toy(dtype: torch.dtype) -> ir.Model:
    """Shared: clone it before a change."""
    return export_module(meta_toy(dtype), SPEC)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def exported(request, weights, tmp_path_factory) -> tuple[torch.dtype, Path]:
    folder = tmp_path_factory.mktemp("toy")
    model = exported_toy(request.param).clone()
    write_weights(model, weights.__getitem__, folder / DATA_NAME)
    ir.save(with_function_bodies(model), folder / "typed.onnx")
    ir.save(with_function_bodies(widened(model)), folder / "model.onnx")
    return request.param, folder


def relative_rms(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def test_both_graphs_pass_the_checker(exported):
    for name in ("typed.onnx", "model.onnx"):
        onnx.checker.check_model(str(exported[1] / name), full_check=True)


def test_the_op_is_one_node_with_a_body(exported):
    for name in ("typed.onnx", "model.onnx"):
        model = onnx.load(exported[1] / name, load_external_data=False)
        assert [n.op_type for n in model.graph.node if n.domain == "sana"] == ["ReluLinearAttention"]
        assert [f.name for f in model.functions] == ["ReluLinearAttention"]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (1, 7, 9), (3, 16, 4)])
def test_portable_graph_computes_the_model_at_any_size(exported, weights, batch, height, width):
    dtype, folder = exported
    exact, same = Toy().eval(), Toy().eval()
    exact.load_state_dict(weights)
    same.load_state_dict(weights)
    example = inputs(batch, height, width)
    with torch.inference_mode():
        expected = exact(*example).numpy()
        own = same.to(dtype)(*example).numpy()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    got = session.run(None, {t.name: x.numpy() for t, x in zip(SPEC.inputs, example, strict=True)})[0]
    assert relative_rms(got, expected) <= max(2 * relative_rms(own, expected), 1e-6)


def test_portable_graph_stores_weights_at_the_precision_and_computes_in_fp32(exported):
    dtype, folder = exported
    typed, portable = (onnx.load(folder / name, load_external_data=False) for name in ("typed.onnx", "model.onnx"))
    stored = HALF.get(dtype, onnx.TensorProto.FLOAT)
    for model in (typed, portable):
        external = [t for t in model.graph.initializer if t.external_data]
        assert len(external) == len(list(Toy().parameters()))
        assert {t.data_type for t in external} == {stored}
    stored_values = {t.name for t in portable.graph.initializer} | {
        n.output[0] for n in portable.graph.node if n.op_type == "Gather"
    }
    computed = {v.type.tensor_type.elem_type for v in portable.graph.value_info if v.name not in stored_values}
    assert computed - {onnx.TensorProto.INT64, onnx.TensorProto.BOOL} == {onnx.TensorProto.FLOAT}
    assert not any(t.data_type in HALF.values() for t in portable.graph.initializer if not t.external_data)
    assert (dtype == torch.float32) == (typed == portable)


def test_a_table_of_words_is_widened_after_the_lookup(exported):
    portable = onnx.load(exported[1] / "model.onnx", load_external_data=False)
    lookups = [n for n in portable.graph.node if n.op_type == "Gather" and "words.weight" in n.input]
    assert len(lookups) == 1


def test_names_are_the_checkpoints_and_dimensions_have_names(exported):
    model = onnx.load(exported[1] / "model.onnx", load_external_data=False)
    assert {t.name for t in model.graph.initializer if t.external_data} == set(Toy().state_dict())
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 4, "height", "width"]
    named = {d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim} - {""}
    assert {"batch", "height", "width"} <= named
    assert not any(re.search(r"\bs\d", name) for name in named)


def test_bytes_are_the_same_every_time_and_hold_no_paths(exported, weights, tmp_path):
    dtype, folder = exported
    model = export_module(meta_toy(dtype), SPEC)
    write_weights(model, weights.__getitem__, tmp_path / DATA_NAME)
    ir.save(with_function_bodies(model), tmp_path / "typed.onnx")
    for name in ("typed.onnx", DATA_NAME):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    data = (folder / "typed.onnx").read_bytes()
    for leak in (b".py", str(Path(__file__).parent.parent.parent).encode(), str(tmp_path.parent).encode()):
        assert leak not in data


class Small(nn.Module):
    """One weight: what is checked at the end of any export is found at once."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(CHANNELS, 1, 1, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


SMALL_SPEC = ExportSpec(axes=SPEC.axes, inputs=SPEC.inputs[:1], outputs=SPEC.outputs, plugins={})


def test_a_lost_plugin_node_is_an_error():
    with pytest.raises(BuildError, match=r"got plugin nodes \{\}; expected \{'ReluLinearAttention': 1\}"):
        export_module(Small(), replace(SMALL_SPEC, plugins={"ReluLinearAttention": 1}))


def test_an_ignored_weight_is_an_error():
    module = Small()
    export_module(module, SMALL_SPEC)
    module.unused = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(BuildError, match="unused"):
        export_module(module, SMALL_SPEC)


@pytest.fixture(scope="module")
def fp16_model() -> ir.Model:
    return exported_toy(torch.float16)


def test_parameters_wait_for_their_bytes(fp16_model):
    assert parameter_names(fp16_model) == sorted(Toy().state_dict())
    assert count_plugin_nodes(fp16_model) == {"ReluLinearAttention": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:1], r"'table': got shape \(1, 64\); the config asks for \(2, 64\)"),
        (lambda t: t * 1e6, "'table' overflows torch.float16"),
        (lambda t: t / 0, "'table' holds NaN or infinity"),
    ],
    ids=["shape", "overflow", "infinite"],
)
def test_weights_that_do_not_fit_are_named(fp16_model, weights, tmp_path, change, message):
    bad = weights | {"table": change(weights["table"])}
    with pytest.raises(CheckpointError, match=message):
        write_weights(fp16_model.clone(), bad.__getitem__, tmp_path / DATA_NAME)
