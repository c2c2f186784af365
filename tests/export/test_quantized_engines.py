"""TensorRT computes what the simulation in PyTorch does, as ONNX Runtime does (test_qdq_nodes.py)."""

from dataclasses import replace

import pytest
import quantized_text
from quantized_engines import QDQ, engine_case, kinds
from tiny_build import RANGES, component, quiet, request, runner, said

from engines import tensorrt
from engines.errors import PluginMissingError, SanaError, SpecError
from engines.gpu import current_target
from engines.spec import Precision, Target
from export.build import build
from export.cases import text_cases
from export.components import profiles, with_weights
from export.parity import bounds, measured, run_tensorrt
from export.reference import make_reference
from export.token_table import with_rows
from export.weight_only import for_targets
from runtime.prompt import PromptTokenizer

HERE = current_target()
AHEAD = [("int8", Target.SM89), ("fp8", Target.SM89), ("int8", Target.SM120), ("fp8", Target.SM120), ("nvfp4", Target.SM120)]
on_a_gpu = pytest.mark.skipif(HERE is None, reason="this machine has no GPU")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), AHEAD, ids=lambda each: str(each))
def test_every_graph_builds_for_others(tmp_path, kind, target):
    """Without their GPU."""
    case = engine_case(kind, (target,))
    report = case.build(tmp_path / "engine", (target,))
    assert report.engine_bytes == (tmp_path / "engine").stat().st_size > 0
    assert report.plugins == case.plugins


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_bound_tells(kind):
    """PyTorch in fp16 is within it. The model that is not quantised is not, nor is one whose outputs are off by a thirtieth."""
    case = engine_case(kind, (Target.SM90,))
    assert case.complaints(case.own) == []
    (first, *_) = case.complaints(case.plain)
    assert "expected at most" in first or "off the model that is not quantised" in first
    assert case.complaints({name: {output: 1.03 * array for output, array in each.items()} for name, each in case.own.items()})


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", ["int8", "fp8", "nvfp4"])
def test_tensorrt_computes_the_simulation(tmp_path, kind, capsys):
    """On sm90 fp8 is cuBLASLt's plugin, elsewhere TensorRT's own product behind Q/DQ."""
    assert HERE is not None
    if kind not in kinds(HERE):
        with pytest.raises(
            SpecError, match=rf"precision: got {kind} for {HERE}; expected .* Use --precision (fp8|int8) there"
        ) as no:
            build(request(tmp_path / "bundle", precision=Precision(kind), targets=(HERE,)), quiet())
        pytest.skip(f"{HERE} is refused: {no.value}")
    case = engine_case(kind, (HERE,))
    try:
        case.build(tmp_path / "engine", (HERE,))
        got = run_tensorrt(tmp_path / "engine", case.golden)
    except SanaError as error:
        if (kind, HERE) != ("int8", Target.SM90) or isinstance(error, PluginMissingError):
            raise
        # NVIDIA does not support TensorRT for RTX there, and INT8 has no kernel of ours.
        pytest.xfail(f"TensorRT {tensorrt.version()}, {kind} on {HERE}: {error}")
    with capsys.disabled():
        print(case.summary(got))
    assert case.complaints(got) == []


@pytest.mark.gpu
@pytest.mark.skipif(HERE is not Target.SM90, reason="needs a GPU of SM 90")
def test_fp8_of_tensorrt_own(tmp_path, capsys):
    """No build makes such an engine: it has the plugins that give FP8 in engines for GPUs that are not here."""
    case = engine_case(QDQ, (Target.SM90,))
    try:
        case.build(tmp_path / "engine", (Target.SM90,))
        got = run_tensorrt(tmp_path / "engine", case.golden)
    except SanaError as error:
        if isinstance(error, PluginMissingError):
            raise
        pytest.xfail(f"TensorRT {tensorrt.version()}, fp8 on sm90: {error}")
    with capsys.disabled():
        print(case.summary(got))
    assert case.complaints(got) == []


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", ["int8", "w8a8"])
@pytest.mark.parametrize("table", [{}, {"text_encoder_table": "host"}], ids=["inside", "host"])
def test_tensorrt_computes_the_text_encoder_in_8_bits(kind, table):
    """int8: weights alone, activations stay bf16. On sm90 weights do too, and the table may be on the host all the same."""
    assert HERE is not None
    progress = quiet()
    kept = for_targets({"text_encoder": kind, **table}, (HERE,), progress)
    if not kept:
        pytest.skip(said(progress).strip())
    part, made = with_weights({"text_encoder": component("text_encoder", Precision.BF16)}, kept)["text_encoder"], runner()
    if kept.get("text_encoder") == "w8a8":
        part = replace(part, plan=quantized_text.encoder("static").plan)
    graphs, tokenizer = made.export(part), PromptTokenizer(made.checkpoint.tokenizer_path, made.checkpoint.prompt)
    profile = profiles(part, RANGES, instructed_tokens=tokenizer.sequence_length(), embedded_guidance=False)
    inputs, _ = text_cases(tokenizer, RANGES.max_batch)
    golden, own = make_reference(part, inputs, made.loader(part))
    got = run_tensorrt(made.engine(part, graphs, (HERE,), profile).path, with_rows(part, graphs.folder, golden))
    assert measured("text_encoder", "tensorrt", got, golden, bounds(own, golden if part.plan else None))
