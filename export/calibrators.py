"""NVIDIA ModelOpt's calibrators: from numbers that were seen to the largest that a scale is made for.

ModelOpt 0.47's HistogramCalibrator fails for e4m3 with the method "mse" (it calls a function of three arguments with two), and its
histogram knows no blocks, so "mse" is its MseCalibrator, which is given the rounding that it is to measure: ours.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from engines.errors import SpecError
from export.recipe import Method

__all__ = ["TESTED", "check_version", "largest_for_scale"]

TESTED = "0.47"  # major and minor version; pyproject.toml's extra `quantize` says the same
MSE_STEP, MSE_LEAST = 0.02, 0.2  # of the largest number: what is tried, from the least to all of it
MAX_COUNTED = 1 << 24  # numbers: ModelOpt's histogram counts in fp32

Round = Callable[[Tensor, float], Tensor]  # numbers and the largest that is kept -> numbers, quantized and dequantized


def check_version() -> str:
    """ModelOpt's version. Raises SpecError if it is not there, or one that was not tested."""
    try:
        found = version("nvidia-modelopt")
    except PackageNotFoundError:
        raise SpecError(
            f"nvidia-modelopt: not installed; expected {TESTED}, whose calibrators find the scales. "
            "Install it: pip install 'sana-deploy[quantize]'; a build with --no-calibrate does without."
        ) from None
    if ".".join(found.split(".")[:2]) != TESTED:
        raise SpecError(
            f"nvidia-modelopt: got {found}, which was not tested; expected {TESTED}. pip install 'nvidia-modelopt=={TESTED}.*'."
        )
    return found


@functools.cache
def _calibrators() -> Any:
    check_version()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit's age, and of a newer transformers, which calibrators do not use
        from modelopt.torch.quantization import calib
    return calib


def largest_for_scale(method: Method, channels: Tensor, rows: Tensor, round_to: Round, *, percentile: float) -> float:
    """The number that becomes the format's largest.

    channels: (depth,) fp32, the largest absolute value of each, over everything seen. rows: (n, depth) fp32, some of it.
    absmax: the largest of channels. percentile: that of the rows' absolute values, in 2048 bins of their range. mse: that for which
    `round_to` changes the rows least, of MSE_LEAST to 1 times their largest. May be 0 or not finite: the caller names the layer.
    """
    calib = _calibrators()
    if method == "absmax":
        calibrator = calib.MaxCalibrator()
        calibrator.collect(channels)
        return float(calibrator.compute_amax())
    if method == "percentile":
        if rows.numel() > MAX_COUNTED:
            raise SpecError(
                f"calibration.rows: got {rows.numel()} numbers of a layer; expected at most {MAX_COUNTED}. "
                "Keep fewer rows, or take fewer prompts."
            )
        calibrator = calib.HistogramCalibrator()
        calibrator.collect(rows)
        return float(calibrator.compute_amax("percentile", percentile=percentile))
    calibrator = calib.MseCalibrator(
        rows.abs().amax(),
        step_size=MSE_STEP,
        start_multiplier=MSE_LEAST,
        stop_multiplier=1.0,
        quant_func=lambda x, amax: round_to(x, float(amax)),
    )
    calibrator.collect(rows)
    amax: Tensor = calibrator.compute_amax()
    return float(torch.as_tensor(amax))
