"""parity.json: how far a bundle's numbers are from the reference's, and how far they may be. docs/bundle.md describes it.

The rule, for every output of every component: rms and maximum of the error are at most twice those of PyTorch at the same
precision, both against a wider reference; and the mean of the error stays under a quarter of its rms, so that
a bias cannot hide behind noise. Every error is divided by the rms of the reference, so that each number means the same everywhere.

All sides compute with the weights that the bundle stores: rounding them is the build's choice and no error of a graph. The portable
graph of a 16-bit component computes in fp32, where twice PyTorch's 16-bit error would hide anything; so it is held to a multiple of
PyTorch's fp32 error, if the reference is wide enough (fp64) to see that.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.errors import ParityError
from engines.quality_report import QualityReport
from engines.spec import ComponentName, Precision
from engines.strict import validate_json

__all__ = [
    "FACTOR",
    "Bound",
    "ComponentParity",
    "ErrorStats",
    "OutputParity",
    "ParityReport",
    "bound_from",
    "check",
    "check_bias",
    "check_size",
    "measure",
    "parse_report",
    "pooled",
    "portable_bound_from",
]

FACTOR = 2.0  # times PyTorch's own error
FP32_FACTOR = 16.0  # times PyTorch's fp32 error, for the portable graphs of 16-bit components: CPUs differ in how they sum
MEAN_SHARE = 0.25  # of the measured rms

Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ErrorStats(_Model):
    """Of the error of one output, relative to the rms of the reference."""

    rms: Positive
    max: Positive  # of the absolute value
    mean: Annotated[float, Field(allow_inf_nan=False)]  # signed


class Bound(_Model):
    """The most that each may be."""

    rms: Positive
    max: Positive
    mean_share: Positive = MEAN_SHARE  # |mean| as a share of the rms that was measured


class OutputParity(_Model):
    pytorch: ErrorStats  # PyTorch at the component's precision
    onnxruntime: ErrorStats | None = None  # the portable graph
    tensorrt: ErrorStats | None = None  # the engine; none where no GPU was there
    bound: Bound
    pytorch_fp32: ErrorStats | None = None  # PyTorch in fp32; none where that is `pytorch`, or the reference itself
    portable_bound: Bound | None = None  # of the portable graph, where it is narrower than `bound`

    def bound_of(self, backend: Literal["onnxruntime", "tensorrt"]) -> Bound:
        """What `backend` is held to."""
        return self.portable_bound if backend == "onnxruntime" and self.portable_bound is not None else self.bound


class ComponentParity(_Model):
    precision: Precision
    outputs: dict[str, OutputParity]


class ParityReport(_Model):
    schema_version: Literal[1, 2] = 1  # 2: there may be a quality section, which programs before it do not know
    reference: Literal["fp32 PyTorch", "fp64 PyTorch"]  # fp64 where a component is fp32 itself, and for small models
    components: dict[ComponentName, ComponentParity]
    machine: str
    versions: dict[str, str]
    quality: QualityReport | None = None  # none where no pictures were drawn

    @model_validator(mode="after")
    def _version_fits(self) -> Self:
        if (self.quality is not None) != (self.schema_version == 2):
            have = "no quality section" if self.quality is None else "a quality section"
            raise ValueError(f"schema_version: got {self.schema_version} with {have}; expected 2 with one, 1 without")
        return self


def parse_report(data: bytes, *, source: str) -> ParityReport:
    """Raises ManifestError."""
    return validate_json(ParityReport, data, source=source)


def bound_from(pytorch: ErrorStats) -> Bound:
    return Bound(rms=FACTOR * pytorch.rms, max=FACTOR * pytorch.max)


def portable_bound_from(pytorch: ErrorStats, pytorch_fp32: ErrorStats) -> Bound:
    """Of the portable graph of a 16-bit component. pytorch: at the component's precision."""
    bound = bound_from(pytorch)
    return Bound(rms=min(bound.rms, FP32_FACTOR * pytorch_fp32.rms), max=min(bound.max, FP32_FACTOR * pytorch_fp32.max))


def measure(got: np.ndarray, reference: np.ndarray) -> ErrorStats:
    """The error of `got`, summed in float64.

    Both of one shape, any float type. Raises ParityError for another shape, for a number that is not finite in either, and for a
    reference that is zero everywhere, against which nothing is relative.
    """
    if got.shape != reference.shape:
        raise ParityError(f"got an output of shape {got.shape}; expected {reference.shape}, as the reference has.")
    exact = reference.astype(np.float64)
    error = got.astype(np.float64) - exact
    if not np.isfinite(error).all():
        raise ParityError(f"got {int((~np.isfinite(got)).sum())} numbers that are not finite, of {got.size}; expected none.")
    scale = math.sqrt(float(np.mean(exact * exact))) if exact.size else 0.0
    if scale == 0.0:
        raise ParityError("the reference is empty or zero everywhere: nothing can be compared with it. Use other inputs.")
    return ErrorStats(
        rms=math.sqrt(float(np.mean(error * error))) / scale,
        max=float(np.abs(error).max()) / scale,
        mean=float(error.mean()) / scale,
    )


def pooled(cases: Collection[tuple[ErrorStats, int]]) -> ErrorStats:
    """The error of several cases taken together; each comes with its number of values."""
    total = sum(size for _, size in cases)
    return ErrorStats(
        rms=math.sqrt(sum(stats.rms**2 * size for stats, size in cases) / total),
        max=max(stats.max for stats, _ in cases),
        mean=sum(stats.mean * size for stats, size in cases) / total,
    )


def check(measured: ErrorStats, bound: Bound) -> list[str]:
    """What is wrong with `measured`, a sentence each: empty if it is within `bound`."""
    return check_size(measured, bound) + check_bias(measured, bound)


def check_size(measured: ErrorStats, bound: Bound) -> list[str]:
    """As check, but for the mean."""
    why = "by PyTorch's own at the same precision"
    return _beyond("rms", measured.rms, bound.rms, why) + _beyond("max", measured.max, bound.max, why)


def check_bias(measured: ErrorStats, bound: Bound) -> list[str]:
    """As check, for the mean alone. Of all cases pooled: within one, an error that all pixels share looks like a bias."""
    most = bound.mean_share * measured.rms
    return _beyond("|mean|", abs(measured.mean), most, "a share of the measured rms: more is a bias")


def _beyond(name: str, got: float, most: float, why: str) -> list[str]:
    return [] if got <= most else [f"{name} error: got {got:.3e}; expected at most {most:.3e}, {why}"]  # NaN is beyond, too
