"""The settings of the objective: checked once, when they are read; a wrong name or value is an error, not a default.

t is the share of noise before the shift, 0 to 1. Sources: Stable Diffusion 3, arXiv:2403.03206, section 3.1 (logit-normal, mode,
cosmap); Min-SNR, arXiv:2303.09556; logit-normal (0, 1) with shift 3 and no weights is Sana's recipe, arXiv:2410.10629.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Custom", "Distribution", "LogitNormal", "Mode", "ObjectiveSettings", "Uniform", "Weighting"]

MODE_MAX = 2 / (math.pi - 2)  # beyond it, and below -1, t no longer falls with u: there is no density
Weighting = Literal["none", "sigma_sqrt", "cosmap", "min_snr"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Uniform(_Settings):
    kind: Literal["uniform"] = "uniform"


class LogitNormal(_Settings):
    """logit(t) is normal."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: Finite = 0.0
    std: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class Mode(_Settings):
    """Heavier in the middle for a scale above 0, at the ends below 0; 0 is uniform."""

    kind: Literal["mode"] = "mode"
    scale: float = Field(default=1.29, ge=-1, le=MODE_MAX)


class Custom(_Settings):
    """A density given by (t, density) points and straight lines between them; it need not be normalised."""

    kind: Literal["custom"] = "custom"
    points: tuple[tuple[Finite, Finite], ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _is_a_density(self) -> Self:
        times = [t for t, _ in self.points]
        if any(a >= b for a, b in itertools.pairwise(times)) or times[0] < 0 or times[-1] > 1:
            raise ValueError(f"points: got t = {times}; expected them rising, within 0 to 1")
        if any(p < 0 for _, p in self.points) or not any(p > 0 for _, p in self.points):
            raise ValueError("points: expected densities of at least 0, and one above 0")
        return self


Distribution = Annotated[Uniform | LogitNormal | Mode | Custom, Field(discriminator="kind")]


class ObjectiveSettings(_Settings):
    """x_t = (1 - t) x0 + t noise; the model learns noise - x0, the mean over elements of a weighted squared error."""

    timesteps: Distribution = LogitNormal()
    flow_shift: float = Field(default=3.0, gt=0, allow_inf_nan=False)  # t' = k t / (1 + (k - 1) t); 1: none
    weighting: Weighting = "none"
    min_snr_gamma: float = Field(default=5.0, gt=0, allow_inf_nan=False)  # of the weighting min_snr
    caption_dropout: float = Field(default=0.1, ge=0, le=1)  # share of captions replaced by the empty prompt
