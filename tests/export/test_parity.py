import numpy as np
import pytest

from engines.errors import ParityError
from engines.golden import Golden
from engines.parity_report import ComponentParity, ErrorStats
from engines.spec import LEVELS, NOT_FINITE, Precision
from export.parity import bounds, measured, summary, without_levels
from export.reference import PyTorchErrors
from runtime.image import to_levels

RNG = np.random.default_rng(0)
EXACT = {case: RNG.standard_normal(1000) for case in "ab"}
GOLDEN = {case: Golden(inputs={"x": np.zeros(1)}, outputs={"y": exact}) for case, exact in EXACT.items()}
OWN = {"a": {"y": ErrorStats(rms=1e-3, max=1e-2, mean=1e-6)}, "b": {"y": ErrorStats(rms=2e-3, max=8e-3, mean=-2e-6)}}
FP32 = {case: {"y": ErrorStats(rms=1e-7, max=1e-6, mean=0.0)} for case in "ab"}


def noisy(size: float, bias: dict[str, float] | None = None) -> dict[str, dict[str, np.ndarray]]:
    noise = {case: RNG.standard_normal(1000) for case in "ab"}
    return {c: {"y": EXACT[c] + size * (noise[c] - noise[c].mean()) + (bias or {}).get(c, 0.0)} for c in "ab"}


def test_pytorchs_worst_case_makes_the_bounds():
    output = bounds(PyTorchErrors(own=OWN, fp32=FP32))["y"]
    assert output.pytorch == ErrorStats(rms=2e-3, max=1e-2, mean=-2e-6)
    assert (output.bound.rms, output.bound.max) == (4e-3, 2e-2)
    assert output.portable_bound is not None
    assert (output.portable_bound.rms, output.portable_bound.max) == (1.6e-6, 1.6e-5)
    assert bounds(PyTorchErrors(own=OWN, fp32=None))["y"].portable_bound is None


def test_the_mean_of_a_quantized_graph():
    """May be twice what the simulation's cases have together, not what one of them has."""
    biased = {"a": {"y": ErrorStats(rms=1e-3, max=1e-2, mean=9e-4)}, "b": {"y": ErrorStats(rms=1e-3, max=8e-3, mean=-3e-4)}}
    pytorch = PyTorchErrors(own=biased, fp32=None)
    assert bounds(pytorch)["y"].bound.mean_share == 0.25
    assert bounds(pytorch, GOLDEN)["y"].bound.mean_share == pytest.approx(2 * 0.3)
    assert bounds(PyTorchErrors(own=OWN, fp32=None), GOLDEN)["y"].bound.mean_share == 0.25


def test_sizes_are_judged_case_by_case_and_the_mean_over_all():
    held_to = bounds(PyTorchErrors(own=OWN, fp32=FP32))
    got = measured("denoiser", "tensorrt", noisy(2e-3), GOLDEN, held_to)
    assert 1.5e-3 < got["y"].rms < 2.5e-3
    measured("denoiser", "tensorrt", noisy(2e-3, {"a": 8e-4, "b": -8e-4}), GOLDEN, held_to)  # each a bias, together none
    with pytest.raises(ParityError, match=r"denoiser, y \(TensorRT, all cases\): \|mean\| error: got 8"):
        measured("denoiser", "tensorrt", noisy(2e-3, {"a": 8e-4, "b": 8e-4}), GOLDEN, held_to)
    with pytest.raises(ParityError, match=r"\(ONNX Runtime, case 'a'\): rms error: got 2.*; expected at most 1.600e-06"):
        measured("denoiser", "onnxruntime", noisy(2e-3), GOLDEN, held_to)


def test_the_summary_says_how_much_of_the_bound_is_used():
    held_to = bounds(PyTorchErrors(own=OWN, fp32=None))
    outputs = {"y": held_to["y"].model_copy(update={"onnxruntime": ErrorStats(rms=1e-3, max=2e-3, mean=0.0)})}
    line = summary("denoiser", ComponentParity(precision=Precision.FP16, outputs=outputs))
    assert line == "  denoiser: y ONNX Runtime rms 1.0e-03 (PyTorch fp16 2.0e-03), 25% of the bound"


def test_levels_are_held_to_the_images():
    images = np.random.default_rng(0).normal(0, 1, (2, 3, 8, 8)).astype(np.float32)
    outputs = {"images": images, LEVELS: to_levels(images), NOT_FINITE: np.zeros(2, np.int32)}
    assert without_levels("a", outputs) == {"images": images}
    assert without_levels("a", {"images": images}) == {"images": images}  # of an engine of before
    wrong = outputs[LEVELS].copy()
    wrong[1, 2, 3, 0] ^= 1
    with pytest.raises(ParityError, match=r"decoder, levels \(TensorRT, a\): got 1 of 384 that are not those"):
        without_levels("a", outputs | {LEVELS: wrong})
    broken = images.copy()
    broken[1, 0, 0, 0] = np.inf
    with pytest.raises(ParityError, match=r"not_finite \(TensorRT, a\): got \[0 0\]; expected \[0 1\]"):
        without_levels("a", outputs | {"images": broken})
    assert without_levels("a", outputs | {"images": broken, NOT_FINITE: np.array([0, 1], np.int32)}) == {"images": broken}
