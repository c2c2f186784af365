"""Before it times, latency.py holds the engines of a GPU to PyTorch for each work: with fake errors, and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import latency_parity, latency_session
from benchmarks.latency_plan import has_narrow_weights
from benchmarks.latency_session import complaints, to_check
from benchmarks.latency_work import Work
from engines.parity_report import ErrorStats

Asked = list[tuple[str, int]]
Bundle = Callable[..., Any]


def stats(size: float) -> ErrorStats:
    return ErrorStats(rms=size, max=3 * size, mean=0.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Components and batches whose errors were asked for. Of three pictures the engine's is three times PyTorch's."""
    found: Asked = []

    def errors(engine: object, component: str, checkpoint: object, inputs: Work) -> dict[str, ErrorStats]:
        found.append((component, inputs.batch))
        return {"engine": stats(3.0 if inputs.batch == 3 else float(inputs.batch)), "pytorch": stats(1.0)}

    monkeypatch.setattr(latency_parity, "engine_errors", errors)
    monkeypatch.setattr(latency_parity, "golden_complaints", lambda engine: [])
    monkeypatch.setattr(latency_session, "graph_inputs", lambda engine, work: work)
    return found


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    def make(*ops: str) -> Any:
        """Of a text encoder with these nodes."""
        nodes = [helper.make_node(op, [f"{i}"], [f"{i + 1}"]) for i, op in enumerate(ops)]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("0", f"{len(ops)}")]
        path = tmp_path / "graph.onnx"
        onnx.save(helper.make_model(helper.make_graph(nodes, "text", ends[:1], ends[1:])), path)
        return SimpleNamespace(onnx_path=lambda component: path)

    return make


def works(component: str, *batches: int) -> list[Work]:
    return [Work(component=component, width=64, height=64, batch=batch) for batch in batches]


def test_each_size_and_batch_is_held_to_pytorch(
    asked: Asked, bundle: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    engine: Any = SimpleNamespace(backend="tensorrt", bundle=bundle("Gather"))
    checkpoint: Any = object()
    given = [*works("denoiser", 3, 1), *works("text_encoder", 2)]
    wrong, errors = complaints(engine, checkpoint, given)
    assert sorted(asked) == [("denoiser", 1), ("denoiser", 3), ("text_encoder", 2)]
    assert len(wrong) == 2  # rms and max
    assert all(each.startswith("denoiser, 64 x 64, batch 3: ") for each in wrong)
    assert errors["denoiser"]["engine"] == stats(1.0)  # of the smallest batch
    assert "text_encoder" in capsys.readouterr().out


def test_a_pictures_parts_are_held_to_pytorch_once(asked: Asked, bundle: Bundle) -> None:
    """At its size and batch; what is asked for by itself too is not done twice."""
    engine: Any = SimpleNamespace(backend="tensorrt", bundle=bundle("Gather"))
    checkpoint: Any = object()
    wrong, _ = complaints(engine, checkpoint, [*works("picture", 3, 1), *works("decoder", 3), *works("denoiser", 1)])
    assert sorted(asked) == sorted((name, batch) for name in ("text_encoder", "denoiser", "decoder") for batch in (1, 3))
    assert {each.split(": ")[0] for each in wrong} == {
        "text_encoder, batch 3",
        "denoiser, 64 x 64, batch 3",
        "decoder, 64 x 64, batch 3",
    }
    sizes = {(component, work.width, work.height, work.steps) for component, work in to_check(works("picture", 1))}
    assert sizes == {("text_encoder", 0, 0, 1), ("denoiser", 64, 64, 1), ("decoder", 64, 64, 1)}


def test_a_whole_prompt_has_no_number_of_tokens(asked: Asked, bundle: Bundle) -> None:
    engine: Any = SimpleNamespace(backend="tensorrt", bundle=bundle("Gather"))
    checkpoint: Any = object()
    wrong, _ = complaints(engine, checkpoint, [Work(component="text_encoder", width=0, height=0, batch=3)])
    assert all(each.startswith("text_encoder, batch 3: ") for each in wrong)
    assert len(wrong) == 2


def test_narrow_weights_of_the_text_encoder_have_their_golden_inputs_alone(asked: Asked, bundle: Bundle) -> None:
    engine: Any = SimpleNamespace(backend="tensorrt", bundle=bundle("DequantizeLinear", "Gather"))
    assert has_narrow_weights(engine.bundle, "text_encoder")
    checkpoint: Any = object()
    assert complaints(engine, checkpoint, works("text_encoder", 1)) == ([], {})
    assert asked == []


@pytest.mark.parametrize("change", [{"backend": "onnxruntime"}, {}])
def test_without_engines_or_checkpoint_golden_inputs_decide(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    monkeypatch.setattr(latency_parity, "golden_complaints", lambda engine: ["wrong"])
    engine: Any = SimpleNamespace(**{"backend": "tensorrt"} | change)
    checkpoint: Any = object() if change else None
    assert complaints(engine, checkpoint, works("decoder", 1)) == (["wrong"], {})
    assert asked == []
