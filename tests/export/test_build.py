import json
import shutil
from pathlib import Path

import onnx
import pytest
from cpp_pictures import same_pictures
from safetensors.torch import load_file, save_file
from tiny_build import quiet, request, said, tiny

from engines.bundle import Bundle
from engines.errors import CheckpointError, DiskFullError, ParityError
from engines.spec import COMPONENTS, Precision
from export.build import build
from export.parity import run_onnxruntime


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "bundle"
    build(request(out), quiet())
    return out


def test_the_manifest_says_what_the_checkpoint_is(built):
    manifest = Bundle.open(built).manifest
    assert manifest.precision == {
        "text_encoder": "bf16",
        "text_projection": "fp16",
        "denoiser": "fp16",
        "decoder": "bf16",
    }
    assert manifest.plugins == {
        "text_encoder": {"CausalAttention": 1, "NormedSum": 2, "RotateHeads": 1},
        "text_projection": {},
        "denoiser": {
            "CrossAttention": 1,
            "GatedDepthwiseConv": 1,
            "GatedModulatedNorm": 1,
            "LinearAttentionApply": 1,
            "LinearAttentionState": 1,
            "ModulatedNorm": 1,
        },
        "decoder": {
            "Conv3x3": 5,
            "Conv3x3Norm": 4,
            "Conv3x3Upsample": 5,
            "GatedDepthwiseConv": 1,
            "LinearAttentionApply": 1,
            "LinearAttentionState": 1,
            "MultiscaleProjection": 1,
        },
    }
    assert (manifest.model, manifest.variant, manifest.targets, manifest.tensorrt) == ("tiny", "custom", (), None)
    assert (manifest.ranges.min_side, manifest.ranges.opt_side, manifest.ranges.max_side) == (64, 128, 256)
    assert manifest.prompt.complex_human_instruction.startswith("Say it better:")
    assert manifest.prompt.max_sequence_length == manifest.ranges.max_sequence_length == 24
    assert (manifest.schedule.scheduler, manifest.schedule.flow_shift) == ("flow_dpm_solver", 3.0)
    assert (manifest.latents.channels, manifest.latents.scaling_factor) == (32, 0.41407)


@pytest.mark.filterwarnings("ignore::runtime.prompt.PromptCutWarning")  # when Python draws a picture again
def test_the_cpp_runtime_draws_the_same(cpp, built, tmp_path):
    same_pictures(cpp, built, tmp_path, [{"seed": 5, "steps": 3}, {"seed": 5, "steps": 3, "width": 64, "height": 256}])


def test_parity_is_reported_and_holds(built):
    report = json.loads((built / "parity.json").read_text())
    assert report["reference"] == "fp64 PyTorch"
    for component in COMPONENTS:
        for output in report["components"][component]["outputs"].values():
            assert output["onnxruntime"]["rms"] <= output["portable_bound"]["rms"] < output["bound"]["rms"] / 20
            assert output["tensorrt"] is None


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_node_that_tensorrt_rtx_1_6_refuses(built, component):
    """Its core has no Squeeze for the parser of 1.7, and both together are what runs on compute capability 9.0."""
    graph = onnx.load(built / component / "model.onnx", load_external_data=False).graph
    assert "Squeeze" not in {node.op_type for node in graph.node}


def test_the_bundle_draws(built):
    from runtime.engine import SanaEngine

    with SanaEngine(built, backend="onnxruntime") as engine:
        assert engine.generate("a red apple", steps=2, width=64, height=96)[0].size == (64, 96)


def test_a_second_run_does_nothing_and_says_so(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    progress = quiet()
    assert build(request(built), progress).unchanged
    assert all(stage.cached for stage in progress.stages if stage.name != "read checkpoint")
    assert "unchanged, nothing done" in said(progress)
    assert before == {path: path.stat().st_mtime_ns for path in built.rglob("*")}


def test_the_same_request_gives_the_same_bytes_elsewhere(built, tmp_path):
    result = build(request(tmp_path / "elsewhere"), quiet())
    assert not result.unchanged
    assert result.bundle.digest == Bundle.open(built).digest


def test_a_damaged_bundle_is_written_again(built, tmp_path):
    out = tmp_path / "bundle"
    shutil.copytree(built, out)
    data = bytearray((out / "denoiser/model.onnx.data").read_bytes())
    data[100] ^= 1
    (out / "denoiser/model.onnx.data").write_bytes(data)
    assert not build(request(out), quiet()).unchanged
    assert Bundle.open(out).digest == Bundle.open(built).digest


@pytest.fixture
def changed(tmp_path) -> Path:
    """Another transformer in the same pipeline."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny(), folder)
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    weights["proj_out.bias"] += 0.5
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_only_what_depends_on_a_change_is_done_again(built, changed, tmp_path):
    progress = quiet()
    build(request(tmp_path / "bundle", model=changed), progress)
    done = {stage.name for stage in progress.stages if not stage.cached}
    parts = {f"{stage} {part}" for stage in ("export", "reference", "parity") for part in ("text_projection", "denoiser")}
    assert done == {"read checkpoint", *parts, "quality", "write bundle"}


def again(monkeypatch, stage: str) -> None:
    """Let the cached results of one stage be those of other source code."""
    monkeypatch.setattr(f"export.stages.{stage}_CODE", ("LICENSE",))


def test_a_failed_parity_check_leaves_the_old_bundle(built, tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    shutil.copytree(built, out)

    def slightly_wrong(graph, golden, *, frugal):
        got = run_onnxruntime(graph, golden, frugal=frugal)
        return {case: {name: 1.001 * array for name, array in outputs.items()} for case, outputs in got.items()}

    again(monkeypatch, "PARITY")
    monkeypatch.setattr("export.stages.run_onnxruntime", slightly_wrong)
    expected = r"text_encoder, prompt_embeds \(ONNX Runtime, case 'prompt'\): rms error: got 1.000e-03; expected at most"
    with pytest.raises(ParityError, match=expected):
        build(request(out), quiet())
    assert Bundle.open(out).digest == Bundle.open(built).digest


@pytest.mark.slow
def test_one_component_alone(tmp_path):
    result = build(request(tmp_path / "bundle", components=("decoder",)), quiet())
    assert result.bundle.manifest.components == ("decoder",)


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(tiny(), folder)
    config = json.loads((folder / "transformer/config.json").read_text()) | {"caption_channels": 40}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"caption_projection.linear_1.weight.*\(64, 48\).*\(64, 40\)"):
        build(request(tmp_path / "bundle", model=folder), quiet())


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        pytest.param("EXPORT", "export.weights.os.fsync", marks=pytest.mark.slow),
        ("REFERENCE", "export.stages.save_golden"),
        ("PARITY", "shutil.copyfile"),
    ],
    ids=["weights", "cache", "bundle"],
)
def test_a_full_disk_leaves_the_old_bundle(built, tmp_path, monkeypatch, stage, where):
    out = tmp_path / "bundle"
    shutil.copytree(built, out)
    again(monkeypatch, stage)
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(DiskFullError, match=r"disk full: got .* free at .*Free some space"):
        build(request(out, components=("denoiser",)), quiet())
    assert Bundle.open(out).digest == Bundle.open(built).digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_fp32_is_held_to_twice_pytorchs_fp32_error(tmp_path):
    result = build(request(tmp_path / "bundle", precision=Precision.FP32), quiet())
    report = json.loads((result.bundle.path / "parity.json").read_text())
    for component in report["components"].values():
        for output in component["outputs"].values():
            assert output["portable_bound"] is None
            assert output["bound"]["rms"] == pytest.approx(2 * output["pytorch"]["rms"])
