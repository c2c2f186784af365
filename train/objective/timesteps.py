"""Timestep distributions as quantile functions, so that every distribution is a map of one uniform number.

Computed in float64 on the CPU. t is the share of noise: 0 is the picture, 1 is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from train.objective.settings import Custom, Distribution, LogitNormal, Mode, ObjectiveSettings

__all__ = ["loss_weight", "quantile", "shift"]

LEAST = 2.0**-54  # torch.rand gives multiples of 2**-53, 0 among them, whose normal quantile is infinite


def quantile(distribution: Distribution, u: Tensor) -> Tensor:
    """The t below which a share u of the distribution lies. u: (B,) float64 from 0 to 1; returns (B,) float64."""
    if isinstance(distribution, LogitNormal):
        return torch.sigmoid(distribution.mean + distribution.std * torch.special.ndtri(u.clamp(min=LEAST)))
    if isinstance(distribution, Mode):  # the paper's f(1 - u), which rises
        return u + distribution.scale * (u - torch.sin(u * (math.pi / 2)).square())
    if isinstance(distribution, Custom):
        return _piecewise_linear(distribution.points, u)
    return u


def _piecewise_linear(points: Sequence[tuple[float, float]], u: Tensor) -> Tensor:
    """Within a segment the mass is a quadratic of t; of its solution, the form that does not cancel."""
    t, p = torch.tensor(points, dtype=torch.float64).unbind(1)
    width = t.diff()
    total = torch.cat([torch.zeros(1, dtype=torch.float64), ((p[:-1] + p[1:]) / 2 * width).cumsum(0)])
    mass = u * total[-1]
    segment = (torch.searchsorted(total, mass, right=True) - 1).clamp(max=len(width) - 1)
    rest, low, slope = mass - total[segment], p[segment], (p.diff() / width)[segment]
    root = (low.square() + 2 * slope * rest).clamp(min=0).sqrt()
    inside = 2 * rest / (low + root).clamp(min=torch.finfo(torch.float64).tiny)
    return t[segment] + torch.minimum(inside, width[segment])


def shift(t: Tensor, flow_shift: float) -> Tensor:
    """More noise for a shift above 1. Source: Stable Diffusion 3, arXiv:2403.03206, section 5.3.2."""
    return flow_shift * t / (1 + (flow_shift - 1) * t)


def loss_weight(settings: ObjectiveSettings, t: Tensor) -> Tensor:
    """The weight of the velocity's squared error at (shifted) t, (B,).

    sigma_sqrt: t**-2, as diffusers' training scripts name it; large near the picture. cosmap: arXiv:2403.03206, section 3.1, the
    density of a cosine schedule. min_snr: arXiv:2303.09556 weighs the error of x0 by min(SNR, gamma); SNR = ((1 - t) / t)**2 here,
    and the velocity's squared error is t**-2 times that of x0, which leaves min((1 - t)**2, gamma t**2).
    """
    if settings.weighting == "sigma_sqrt":
        return t**-2
    if settings.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t * t))
    if settings.weighting == "min_snr":
        return torch.minimum((1 - t).square(), settings.min_snr_gamma * t.square())
    return torch.ones_like(t)
