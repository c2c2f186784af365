"""The plan that a bundle's own graph holds, and parity of a quantised denoiser by it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from quantized_denoiser import cases, denoiser, graphs, plan, simulated
from tiny_build import quiet, request, tiny

from benchmarks.latency_parity import dtype_of, engine_errors
from benchmarks.latency_plan import bundle_plan
from benchmarks.latency_work import Work, graph_inputs
from engines.errors import BundleError
from engines.parity_report import bound_from, check_size, measure
from engines.quantization_report import QUANTIZATION_NAME, QuantizationReport
from engines.spec import Precision
from export.build import build
from runtime import SanaEngine
from sana_ref.checkpoint import load
from sana_ref.quantization import groups_of, save_plan

NAMES = [name for name, _ in denoiser().module.named_parameters()]


def bundle_of(folder: Path, precision: Precision, files: tuple[str, ...] = ()) -> Any:
    """What is read of a bundle; its graph is folder/model.onnx."""
    manifest = SimpleNamespace(precision={"denoiser": precision}, files=dict.fromkeys(files))
    return SimpleNamespace(
        path=folder, manifest=manifest, onnx_path=lambda _: folder / "model.onnx", file=lambda name: folder / name
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4", "int8 a token", "fp8 a token"])
def test_the_graph_has_the_plan(name: str) -> None:
    """With smoothing and low-rank branches, whose inverse is stored: PyTorch computes the same with either, but for that."""
    made = plan(name)
    found = bundle_plan(bundle_of(graphs(name), Precision(name.split()[0])), NAMES)
    assert found is not None
    assert found.layers.keys() == made.layers.keys()
    for group, layer in made.layers.items():
        assert found.layers[group].format == layer.format
        assert found.layers[group].input_scale == (None if layer.input_scale is None else pytest.approx(layer.input_scale))
    assert made.tensors.keys() <= found.tensors.keys()
    for key, tensor in made.tensors.items():
        torch.testing.assert_close(found.tensors[key], tensor.float())
    got, exact = simulated(found, torch.float32), simulated(made, torch.float32)
    plain = simulated(made.model_copy(update={"layers": {}, "tensors": {}}), torch.float32)
    for case, outputs in exact.items():
        rounding = measure(plain[case]["prediction"], outputs["prediction"]).rms
        assert measure(got[case]["prediction"], outputs["prediction"]).rms < 0.1 * rounding


def test_an_engine_that_alone_is_quantised(tmp_path: Path) -> None:
    """fp8 on sm90: formats are the report's; a bundle of before has none, and all groups are fp8."""
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "model.onnx")
    groups = list(groups_of(NAMES))
    whole = bundle_plan(bundle_of(tmp_path, Precision.FP8), NAMES)
    assert whole is not None
    assert {group: layer.format for group, layer in whole.layers.items()} == dict.fromkeys(groups, "fp8")
    formats: dict[str, Any] = {group: "none" if group.endswith("to_q") else Precision.FP8 for group in groups}
    report = QuantizationReport(method="plan", recipe=None, formats=formats, prompts=None, budget=None, measured={})
    (tmp_path / "denoiser").mkdir()
    (tmp_path / QUANTIZATION_NAME).write_text(report.model_dump_json())
    some = bundle_plan(bundle_of(tmp_path, Precision.FP8, (QUANTIZATION_NAME,)), NAMES)
    assert some is not None
    assert [*some.layers] == [group for group in groups if not group.endswith("to_q")]
    assert all(layer.input_scale is None for layer in some.layers.values())
    with pytest.raises(BundleError, match=r"got no quantised product in the denoiser's graph; expected int8\. Rebuild"):
        bundle_plan(bundle_of(tmp_path, Precision.INT8), NAMES)
    assert bundle_plan(bundle_of(tmp_path, Precision.FP16), NAMES) is None


def test_nvfp4_without_a_scale(tmp_path: Path) -> None:
    numbers = onnx.helper.make_tensor(
        "transformer.transformer_blocks.0.attn2.to_q.weight_numbers_packed", TensorProto.UINT8, [1], [0]
    )
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [numbers])), tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"transformer_blocks\.0\.attn2\.to_q: got nvfp4 without input_scale"):
        bundle_plan(bundle_of(tmp_path, Precision.NVFP4), NAMES)


def test_peers_have_nothing_narrower() -> None:
    assert {dtype_of("denoiser", str(kind)) for kind in ("int8", "fp8", "nvfp4")} == {torch.float16}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "factor"), [("int8", 8), ("nvfp4", 1 / 64)])
def test_a_denoiser_is_held_to_its_own_plan(name: str, factor: float) -> None:
    """The simulation in fp32 stands for the engine. With scales that are too large it is beyond the bound, or, where blocks have
    scales of their own besides, too small: then their numbers are cut off."""
    inputs = cases()["square"] | {"text_keys": cases()["square"]["text_keys"].astype(np.float32)}
    checkpoint, made = load(tiny()), plan(name)
    wrong = {
        group: layer.model_copy(update={"input_scale": factor * layer.input_scale})
        for group, layer in made.layers.items()
        if layer.input_scale is not None
    }
    for layers, fits in ((made.layers, True), (wrong, False)):
        outputs = simulated(made.model_copy(update={"layers": layers}), torch.float32, {"square": cases()["square"]})["square"]
        session = SimpleNamespace(run=lambda _, outputs=outputs: outputs)
        bundle = bundle_of(graphs(name), Precision(name))
        engine = SimpleNamespace(session=lambda _, session=session: nullcontext(session), manifest=bundle.manifest, bundle=bundle)
        found = engine_errors(engine, "denoiser", checkpoint, inputs, device="cpu")  # type: ignore[arg-type]
        assert (not check_size(found["engine"], bound_from(found["pytorch"]))) == fits


@pytest.mark.slow
def test_a_bundle_with_static_scales(tmp_path: Path) -> None:
    save_plan(plan("int8"), tmp_path / "plan.safetensors")
    wanted = request(
        tmp_path / "bundle",
        precision=Precision.INT8,
        plan=tmp_path / "plan.safetensors",
        components=("text_projection", "denoiser"),
    )
    with SanaEngine(build(wanted, quiet()).bundle.path, backend="onnxruntime") as engine:
        for width in (64, 128):
            inputs = graph_inputs(engine, Work(component="denoiser", width=width, height=64, batch=1))
            errors = engine_errors(engine, "denoiser", load(tiny()), inputs, device="cpu")
            assert not check_size(errors["engine"], bound_from(errors["pytorch"]))
