"""What a quantization may cost, in words: --budget "lpips<=0.08, size<=0.4".

budget  = clause {"," clause}
clause  = metric ("<=" | ">=") number

lpips <= n     perceptual distance to the fp32 reference's pictures, 0 to 1
psnr_db >= n   of pictures to the fp32 reference's, dB
size <= n      the denoiser's weights, of those in fp16: 0.33
error <= n     relative squared error of the final latents, against fp32
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from engines.errors import SpecError
from engines.spec import nearest

__all__ = ["Budget", "parse_budget"]

_DIRECTION = {"lpips": "<=", "psnr_db": ">=", "size": "<=", "error": "<="}
_CLAUSE = re.compile(r"\s*([A-Za-z_]+)\s*(<=|>=|[<>=]+)\s*(\S+)\s*")
_HELP = 'expected clauses such as "lpips<=0.08, size<=0.4"'


class Budget(BaseModel):
    """None: not asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lpips: float | None = None
    psnr_db: float | None = None
    size: float | None = None
    error: float | None = None

    @property
    def of_pictures(self) -> bool:
        """Whether pictures must be drawn to know."""
        return self.lpips is not None or self.psnr_db is not None

    def missed(self, measured: Mapping[str, float]) -> list[str]:
        """The clauses that `measured` does not hold, in words; a metric that was not measured is not held, nor is NaN."""
        found = []
        for metric, direction in _DIRECTION.items():
            wanted, got = getattr(self, metric), measured.get(metric, math.nan)
            if wanted is not None and not (got <= wanted if direction == "<=" else got >= wanted):
                found.append(f"{metric}: got {got:.4g}; expected {direction} {wanted:g}")
        return found

    def __str__(self) -> str:
        return ", ".join(f"{m}{d}{value:g}" for m, d in _DIRECTION.items() if (value := getattr(self, m)) is not None)


def parse_budget(text: str) -> Budget:
    """Raises SpecError for anything that the grammar has no place for: what was got, what was expected."""
    found: dict[str, float] = {}
    for clause in text.split(","):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise SpecError(f"budget: got {clause.strip()!r}; {_HELP}.")
        metric, direction, number = match.groups()
        if metric not in _DIRECTION:
            raise SpecError(f"budget: got the metric {metric!r}; {nearest(metric, _DIRECTION)}.")
        if direction != _DIRECTION[metric]:
            raise SpecError(f"budget: got {metric}{direction}{number}; expected {metric}{_DIRECTION[metric]}number.")
        if metric in found:
            raise SpecError(f"budget: got {metric} twice; expected it once. Leave one out.")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise SpecError(f"budget: got {metric}{direction}{number}; expected a finite number above 0.")
        found[metric] = value
    return Budget(**found)
