"""What only a machine with a GPU can show: the engine's numbers, which is the typed graph, the kernels and TensorRT together."""

import json

import pytest
from tiny_build import quiet, request

from engines import tensorrt
from engines.gpu import current_target
from engines.spec import Precision, Target
from export.build import build
from export.plans import CONV_TARGETS
from export.request import targets_of


@pytest.mark.gpu
@pytest.mark.skipif(current_target() is None, reason="this machine has no GPU")
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.FP32], ids=str)
def test_engines_for_this_gpu_hold_parity(tmp_path, precision):
    if precision == Precision.FP32 and current_target() == Target.SM90 and tensorrt.version().startswith("1.6."):
        pytest.xfail("TensorRT for RTX 1.6 computes fp32 products in TF32 on SM 9.0, and parity refuses that")
    bundle = build(request(tmp_path / "bundle", precision=precision, targets=targets_of("current")), quiet()).bundle
    report = json.loads((bundle.path / "parity.json").read_text())
    for component in report["components"].values():
        for output in component["outputs"].values():
            assert output["tensorrt"]["rms"] <= output["bound"]["rms"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Precision.FP8, Precision.INT8], ids=str)
def test_a_decoder_in_8_bits_holds_parity(tmp_path, kind):
    if current_target() not in CONV_TARGETS[kind]:
        pytest.skip(f"this machine has no GPU with {kind}")
    options = {"targets": targets_of("current"), "components": ("decoder",), "decoder_precision": kind}
    bundle = build(request(tmp_path / "bundle", **options), quiet()).bundle
    assert bundle.manifest.precision == {"decoder": kind}
    (output,) = json.loads((bundle.path / "parity.json").read_text())["components"]["decoder"]["outputs"].values()
    assert output["tensorrt"]["rms"] <= output["bound"]["rms"]
