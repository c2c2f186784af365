"""Builds in 8 and 4 bits: the plan that they follow, and what they refuse."""

import json

import pytest
from tiny_build import quiet, request, said, tiny

from engines.errors import SpecError
from engines.spec import Precision, Target
from export import plans
from export.build import build
from export.plans import check_request
from sana_ref.checkpoint import load
from sana_ref.quantization import LayerPlan, QuantizationPlan, groups_of, save_plan
from sana_ref.quantized import uniform_plan

GROUP = "transformer_blocks.0.ff.conv_point"
STATIC = LayerPlan(format="int8", input_scale=0.05)


def planned(tmp_path, **layers: LayerPlan):
    """A file with GROUP as `layer` says."""
    path = tmp_path / "plan.safetensors"
    save_plan(QuantizationPlan(layers={GROUP: layers["layer"]}), path)
    return path


@pytest.mark.parametrize(
    ("precision", "targets", "layer", "words"),
    [
        (Precision.FP16, (), STATIC, "with --precision fp16; expected one of int8, fp8, nvfp4"),
        (Precision.FP8, (), STATIC, "with int8; expected some fp8"),
        (Precision.INT8, (), LayerPlan(format="none"), "with no quantized layer; expected some int8"),
        (Precision.FP8, (Target.SM90,), STATIC, f"plan, {GROUP}: got what fp8 on sm90 has not"),
        (Precision.FP8, (Target.SM86,), LayerPlan(format="fp8", input_scale=1.0), "got fp8 for sm86"),
        (
            Precision.INT8,
            (Target.SM80, Target.SM89),
            LayerPlan(format="int8"),
            f"{GROUP}: got int8 without input_scale for sm80, sm89; .* Calibrate it, or use --target onnx",
        ),
    ],
)
def test_requests_that_cannot_be(tmp_path, precision, targets, layer, words):
    with pytest.raises(SpecError, match=words):
        check_request(request(tmp_path / "out", precision=precision, targets=targets, plan=planned(tmp_path, layer=layer)))


def test_requests_that_can(tmp_path):
    for targets in ((), (Target.SM80, Target.SM90, Target.SM120)):
        check_request(request(tmp_path / "out", precision=Precision.INT8, targets=targets, plan=planned(tmp_path, layer=STATIC)))


def test_scales_for_cublas():
    """Of layers whose input comes from a kernel that is given one; q, k and v find a token's own, which is more exact."""
    qkv = "transformer_blocks.0.attn1.to_qkv"
    layers = {GROUP: LayerPlan(format="fp8", input_scale=0.5), qkv: LayerPlan(format="fp8", input_scale=0.25)}
    assert plans.for_cublas(QuantizationPlan(layers=layers)).layers == layers | {qkv: LayerPlan(format="fp8")}


def test_a_range_that_is_none(tmp_path):
    path = planned(tmp_path, layer=STATIC)
    for bad in (b"0.0", b"NaN"):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(path.read_bytes().replace(b"0.05", bad.ljust(4)))
        with pytest.raises(SpecError, match=f"{GROUP}`?.input_scale"):
            check_request(request(tmp_path / "out", precision=Precision.INT8, plan=broken))


def test_a_build_without_a_calibration(tmp_path):
    """Scales come from the inputs of the parity check; what comes out is within twice the simulation's error."""
    progress = quiet()
    bundle = build(request(tmp_path / "four", precision=Precision.NVFP4, components=("denoiser",)), progress).bundle
    assert bundle.manifest.precision == {"denoiser": "nvfp4"}
    assert "ranges denoiser" in said(progress)
    assert "6 of 6 groups" in said(progress)
    outputs = json.loads((tmp_path / "four/parity.json").read_text())["components"]["denoiser"]["outputs"]
    for output in outputs.values():
        assert output["onnxruntime"]["rms"] <= output["bound"]["rms"]
        assert output["bound"]["rms"] == pytest.approx(2 * output["pytorch"]["rms"])
        assert output["portable_bound"] is None
    assert build(request(tmp_path / "four", precision=Precision.NVFP4, components=("denoiser",)), quiet()).unchanged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "targets"),
    [
        (Precision.INT8, (Target.SM80, Target.SM86, Target.SM89, Target.SM120)),
        (Precision.FP8, (Target.SM89, Target.SM120)),
        (Precision.NVFP4, (Target.SM120, Target.SM121)),
    ],
)
def test_engines_are_built_without_a_gpu(tmp_path, precision, targets):
    bundle = build(request(tmp_path / "bundle", precision=precision, targets=targets, components=("denoiser",)), quiet()).bundle
    assert bundle.engine_path("denoiser", targets[0]) is not None
    assert bundle.manifest.precision == {"denoiser": precision}


@pytest.mark.slow
def test_another_plan_is_another_build(tmp_path):
    groups = groups_of(load(tiny()).sources["transformer"].shapes)
    found = []
    for name, scale in (("one", 0.05), ("two", 0.06)):
        path = tmp_path / f"{name}.safetensors"
        save_plan(uniform_plan("int8", groups, dict.fromkeys(groups, scale)), path)
        wanted = request(tmp_path / "out", precision=Precision.INT8, components=("denoiser",), plan=path)
        found.append(build(wanted, quiet()).bundle.digest)
    assert found[0] != found[1]
    unknown = tmp_path / "unknown.safetensors"
    save_plan(QuantizationPlan(layers={"transformer_blocks.9.ff.conv_point": STATIC}), unknown)
    with pytest.raises(SpecError, match=r"got the group 'transformer_blocks\.9\.ff\.conv_point'; did you mean"):
        build(request(tmp_path / "out", precision=Precision.INT8, plan=unknown), quiet())
