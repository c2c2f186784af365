"""denoiser/quantization.json: how a bundle's denoiser was quantized. docs/bundle.md describes it.

Where a recipe was followed, denoiser/recipe.yaml beside it has all of it, and builds another bundle so.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.spec import Precision
from engines.strict import validate_json

__all__ = ["QUANTIZATION_NAME", "RECIPE_NAME", "Method", "QuantizationReport", "parse_quantization"]

QUANTIZATION_NAME = "denoiser/quantization.json"
RECIPE_NAME = "denoiser/recipe.yaml"

# calibration: scales from real sampling runs. plan: a file that was given. parity inputs: scales from the inputs of the parity
# check. dynamic: a scale a token, found while it runs.
Method = Literal["calibration", "plan", "parity inputs", "dynamic"]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Real = Annotated[float, Field(allow_inf_nan=False)]
_WORDS: dict[Method, str] = {
    "calibration": "calibrated",
    "plan": "by a plan that was given",
    "parity inputs": "not calibrated: scales from the inputs of the parity check",
    "dynamic": "not calibrated: a scale a token, found while it runs",
}


class QuantizationReport(BaseModel):
    """formats: of every group of layers of the denoiser's blocks; none: fp16. measured: what the choice under `budget` cost."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    method: Method
    recipe: Text | None  # the name of it
    formats: Annotated[dict[Text, Precision | Literal["none"]], Field(min_length=1, max_length=100_000)]
    prompts: Annotated[int, Field(ge=1)] | None  # that it was calibrated on
    budget: Text | None
    measured: dict[Text, Real]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.method == "calibration") != (self.recipe is not None and self.prompts is not None):
            raise ValueError(f"got the method {self.method!r}; expected a recipe and a number of prompts with calibration alone")
        return self

    def lines(self) -> list[str]:
        """For people."""
        counts = Counter(str(kind) for kind in self.formats.values())
        parts = [f"{count} {'fp16' if kind == 'none' else kind}" for kind, count in counts.most_common()]
        how = _WORDS[self.method]
        if self.method == "calibration":
            how = f"calibrated by the recipe {self.recipe} on {self.prompts} prompts"
        found = [f"of {len(self.formats)} groups of layers {', '.join(parts)}; {how}"]
        if self.budget is not None:
            cost = ", ".join(f"{name} {value:.4g}" for name, value in sorted(self.measured.items()))
            found.append(f"chosen for the budget {self.budget}; simulated: {cost}")
        return found


def parse_quantization(data: bytes, *, source: str) -> QuantizationReport:
    """Raises ManifestError."""
    return validate_json(QuantizationReport, data, source=source)
