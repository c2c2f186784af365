"""What quantisation to FP8, row by row, and to FP8 or INT8 with a scale that is known, is compared with, and what GPUs have it."""

import torch

__all__ = ["TARGETS_OF", "assert_bits", "assert_e4m3", "quantized_truth"]

_FP8 = ("sm89", "sm90", "sm100", "sm120")
TARGETS_OF = {"fp8": _FP8, "int8": ("sm80", "sm86", *_FP8)}  # architectures that have the numbers


def quantized_truth(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale (…, D), which rounds to the bits; scale (…)) of x (…, D): fp64 if x is, else fp32. x is on a CPU, where
    PyTorch divides; on a GPU it multiplies by the reciprocal."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(-1) / 448).clamp(min=2.0**-126)
    return wide / scale[..., None], scale


def assert_e4m3(bits: torch.Tensor, exact: torch.Tensor, tolerance: torch.Tensor, name: str) -> None:
    """bits: int8, those of e4m3. Each is what a number within `tolerance` of `exact` rounds to, and NaN where `exact` is NaN."""
    assert_bits("fp8", bits, exact, tolerance, name)


def assert_bits(
    kind: str, bits: torch.Tensor, exact: torch.Tensor, tolerance: torch.Tensor, name: str, *, least: float = -127.0
) -> None:
    """bits: int8, those of e4m3 for "fp8", else of "int8", of which NaN and the smallest number are `least`. As `assert_e4m3`."""
    assert bits.dtype == torch.int8
    if kind == "fp8":
        got = bits.view(torch.float8_e4m3fn).double()
        low, high = ((exact + sign * tolerance).clamp(-448, 448).to(torch.float8_e4m3fn).double() for sign in (-1, 1))
    else:
        got, exact = bits.double(), exact.nan_to_num(nan=least, posinf=torch.inf, neginf=-torch.inf)
        tolerance = tolerance.nan_to_num(nan=0.0, posinf=0.0)
        low, high = ((exact + sign * tolerance).round().clamp(least, 127) for sign in (-1, 1))  # ties to even
    wrong = ~(((low <= got) & (got <= high)) | (got.isnan() & exact.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values are wrong, the first at {at}: got {got[at]}; expected {low[at]} "
            f"to {high[at]}, {exact[at]} rounded"
        )
