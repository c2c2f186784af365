"""PSNR, SSIM and LPIPS of pairs of pictures, and the mean of such numbers with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engines.errors import ParityError
from engines.quality_report import Estimate
from export.metrics.lpips import lpips_alex

__all__ = ["MOST_PSNR_DB", "Likeness", "estimate", "likeness"]

# Both pictures were rounded to 8 bits, each with an error of 1/12 of a squared level: what is nearer than that is not told apart.
MOST_PSNR_DB = 10 * math.log10(255**2 * 12)
RESAMPLES = 2000
TAIL = 2.5  # percent, on either side of the interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """Of two pictures. psnr_db: at most MOST_PSNR_DB. ssim: 1 for equal ones. lpips: 0 for equal ones."""

    psnr_db: float
    ssim: float
    lpips: float


def likeness(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> list[Likeness]:
    """Of each pair, RGB, all of one size. Raises ParityError for other sizes or counts.

    SSIM: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004, of levels 0 to 1, by
    torchmetrics, like PSNR.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    sizes = {picture.size for picture in (*first, *second)}
    if len(sizes) != 1 or len(first) != len(second):
        raise ParityError(
            f"pictures: got {len(first)} and {len(second)} of the sizes {sorted(sizes)}; expected as many of the same size. "
            "Compare bundles with the same default side."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, found = lpips_alex(device), []
    with torch.inference_mode():
        for pair in zip(first, second, strict=True):
            a, b = (_levels(picture).to(device) for picture in pair)
            psnr = peak_signal_noise_ratio(a, b, data_range=1.0)
            ssim = structural_similarity_index_measure(a, b, data_range=1.0)
            assert isinstance(ssim, Tensor)  # no picture of it was asked for
            distance = network(2 * a - 1, 2 * b - 1)
            found.append(Likeness(psnr_db=min(MOST_PSNR_DB, float(psnr)), ssim=float(ssim), lpips=float(distance)))
    return found


def _levels(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) fp32, 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255


def estimate(values: NDArray[np.float64], *, seed: int = 0) -> Estimate:
    """The mean of values (prompts, seeds) and its 95 % interval, the same each time.

    A bootstrap in two stages: prompts are drawn with replacement, then seeds of each, because pictures of a prompt are alike. For a
    difference, give the differences of pairs: what both have in common then drops out. Raises ValueError for none, or not finite.
    """
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values: got shape {values.shape}; expected (prompts, seeds), at least one, all finite")
    rng, (num, each) = np.random.default_rng(seed), values.shape
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        rows = rng.integers(0, num, (num, 1))
        means[index] = values[rows, rng.integers(0, each, (num, each))].mean()
    low, high = (float(end) for end in np.percentile(means, [TAIL, 100 - TAIL]))
    return Estimate(mean=float(values.mean()), low=low, high=high)
