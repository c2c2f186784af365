"""Builds in 8 and 4 bits: the plan that they follow, and what they refuse."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_build import quiet, request, said, tiny

from engines.errors import CheckpointError, SpecError
from engines.spec import Precision, Target
from export import plans
from export.build import _of_components, build
from export.plans import check_request, decoder_precision
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


@pytest.mark.parametrize(
    ("precision", "targets", "asked", "found"),
    [
        (Precision.FP8, (Target.SM90,), None, "fp8"),
        (Precision.FP8, (Target.SM89, Target.SM120), None, "fp8"),
        (Precision.FP8, (), None, "bf16"),
        (Precision.FP8, (Target.SM90,), "bf16", "bf16"),
        (Precision.FP16, (Target.SM90,), None, "bf16"),
        (Precision.FP16, (Target.SM90,), "fp8", "fp8"),
        (Precision.INT8, (Target.SM89,), "fp8", "fp8"),
        (Precision.NVFP4, (Target.SM120,), None, "fp8"),
        (Precision.NVFP4, (Target.SM120,), "bf16", "bf16"),
        (Precision.NVFP4, (), None, "bf16"),
        (Precision.INT8, (Target.SM80, Target.SM89), None, "bf16"),
        (Precision.INT8, (Target.SM80, Target.SM89), "int8", "int8"),
        (Precision.FP8, (Target.SM90,), "int8", "int8"),
        (Precision.FP16, (Target.SM86, Target.SM120), "int8", "int8"),
        (Precision.FP32, (Target.SM89,), None, "fp32"),
        (Precision.FP32, (), "fp32", "fp32"),
    ],
)
def test_the_decoders_precision(tmp_path, precision, targets, asked, found):
    """FP8 beside FP8 and NVFP4, where every target has it; or where it is asked for."""
    asked = None if asked is None else Precision(asked)
    wanted = request(tmp_path / "out", precision=precision, targets=targets, decoder_precision=asked)
    check_request(wanted)
    assert decoder_precision(wanted) == found


@pytest.mark.parametrize(
    ("precision", "targets", "asked", "words"),
    [
        (Precision.FP8, (Target.SM90,), None, "decoder: fp8 is the 3x3 convolutions of its residual blocks, in engines alone"),
        (Precision.FP8, (), None, "decoder: bf16, because FP8 convolutions are kernels of engines, and none is built"),
        (Precision.FP8, (), "bf16", "decoder: bf16\n"),
        (Precision.INT8, (Target.SM80,), None, "decoder: bf16\n"),
        (Precision.INT8, (Target.SM80,), "int8", "decoder: int8 is the 3x3 convolutions of its residual blocks, in engines alone"),
    ],
)
def test_a_build_says_what_the_decoder_is(tmp_path, precision, targets, asked, words):
    asked = None if asked is None else Precision(asked)
    wanted = request(tmp_path / "out", precision=precision, targets=targets, decoder_precision=asked)
    assert words in "".join(f"{line}\n" for line in _of_components(wanted, decoder_precision(wanted)))


@pytest.mark.parametrize(
    ("precision", "targets", "asked", "words"),
    [
        (
            Precision.FP16,
            (Target.SM80, Target.SM89),
            "fp8",
            "decoder-precision: got fp8 for sm80; .* sm89, sm90, .* Use int8 or bf16",
        ),
        (Precision.INT8, (), "int8", "decoder-precision: got int8 for onnx; expected some of sm80, sm86, .* Use bf16 there"),
        (Precision.FP32, (Target.SM80,), "int8", "decoder-precision: got int8 with --precision fp32; expected fp32. Leave it out"),
        (
            Precision.FP16,
            (Target.SM120,),
            "nvfp4",
            "decoder-precision: got nvfp4 with --precision fp16; expected bf16, fp8 or int8",
        ),
        (Precision.FP16, (), "fp8", "decoder-precision: got fp8 for onnx; .* Use bf16 there"),
        (Precision.FP32, (Target.SM89,), "fp8", "decoder-precision: got fp8 with --precision fp32; expected fp32. Leave it out"),
        (Precision.FP32, (), "bf16", "decoder-precision: got bf16 with --precision fp32; expected fp32. Leave it out"),
        (Precision.FP8, (Target.SM90,), "fp32", "decoder-precision: got fp32 with --precision fp8; expected bf16, fp8 or int8. "),
    ],
)
def test_decoders_that_cannot_be(tmp_path, precision, targets, asked, words):
    with pytest.raises(SpecError, match=words):
        check_request(request(tmp_path / "out", precision=precision, targets=targets, decoder_precision=Precision(asked)))


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


def test_a_weight_that_is_not_finite_is_named_without_a_calibration(tmp_path):
    """And not the layer behind it, whose activations are not finite either."""
    folder = Path(shutil.copytree(tiny(), tmp_path / "bad"))
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors, name = load_file(path), "transformer_blocks.0.attn1.to_k.weight"
    tensors[name][3, 5] = math.nan
    save_file(tensors, path)
    asked = request(tmp_path / "out", precision=Precision.INT8, targets=(Target.SM80,), components=("denoiser",))
    with pytest.raises(CheckpointError, match=f"^{name}: got NaN or infinity in a weight"):
        build(replace(asked, model=str(folder)), quiet())


@pytest.mark.slow
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
    ("kind", "prefix", "targets"),
    [("fp8", "Fp8", (Target.SM89, Target.SM120)), ("int8", "Int8", (Target.SM86, Target.SM120))],
)
def test_a_decoder_in_8_bits(tmp_path, kind, prefix, targets):
    """Its engine has such convolutions; its portable graph, which has none, is held to PyTorch's fp32 error as before."""
    progress = quiet()
    options = {"precision": Precision(kind), "targets": targets, "components": ("decoder",)}
    wanted = request(tmp_path / "bundle", **options, decoder_precision=Precision(kind))
    bundle = build(wanted, progress).bundle
    assert bundle.manifest.precision == {"decoder": kind}
    assert bundle.engine_path("decoder", targets[-1]) is not None
    text = said(progress)
    assert "ranges decoder" in text
    assert f"decoder: {kind} is the 3x3 convolutions of its residual blocks, in engines alone; the rest of it is bf16" in text
    for count in (f"4 {prefix}StaticQuantize", f"4 {prefix}Conv3x3,", f"4 {prefix}Conv3x3Norm", "1 Conv3x3,"):
        assert count in text + ","
    parity = json.loads((bundle.path / "parity.json").read_text())["components"]["decoder"]
    (output,) = parity["outputs"].values()
    assert output["bound"]["rms"] == pytest.approx(2 * output["pytorch"]["rms"])
    assert output["onnxruntime"]["rms"] <= output["portable_bound"]["rms"] < output["bound"]["rms"] / 100
    assert build(wanted, quiet()).unchanged
    other = build(replace(wanted, decoder_precision=Precision.BF16, targets=()), quiet()).bundle
    assert other.manifest.precision == {"decoder": "bf16"}


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
