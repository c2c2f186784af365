"""text_encoder/quantization.json, text_projection/quantization.json: weights in 4 or 8 bits, mostly under 16-bit activations.

What they cost is reported and held to nothing: the parity check holds a bundle to the same weights in PyTorch.
docs/bundle.md describes the file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.spec import ComponentName, Precision
from engines.strict import validate_json

__all__ = ["OutputError", "RoleReport", "WeightReport", "parse_weights", "weights_name"]

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=1, le=1 << 50)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class RoleReport(BaseModel):
    """Of all weights of one role, such as mlp.up_proj of every block. error: RMS of what was lost, of the weights' own RMS."""

    model_config = _STRICT

    tensors: Count
    bytes_before: Count  # in 16 bits
    bytes_after: Count  # numbers and scales
    error: Size


class OutputError(BaseModel):
    """Of an output on the inputs of the parity check, over all cases; padding is left out where a mask says what it is.

    rms: of the difference, of the exact output's own RMS. cosine: between both, vector by vector along the last axis, the mean and
    the least.
    """

    model_config = _STRICT

    rms: Size
    cosine: Annotated[float, Field(ge=-1.001, le=1.001)]
    least_cosine: Annotated[float, Field(ge=-1.001, le=1.001)]


class WeightReport(BaseModel):
    """outputs: against the same network whose weights are not quantized, both in fp32 or wider."""

    model_config = _STRICT

    schema_version: Literal[1] = 1
    format: Literal["int4", "int8", "fp8"]
    table: Literal["int4", "int8", "fp8", "host"] | None = None  # of the table of tokens, where it has another
    activations: Literal["int8"] | None = None  # of linear layers' inputs; None: as precision
    precision: Precision  # of activations and scales, but for `activations`
    roles: Annotated[dict[Text, RoleReport], Field(min_length=1, max_length=1000)]
    outputs: Annotated[dict[Text, OutputError], Field(min_length=1, max_length=100)]

    def lines(self) -> list[str]:
        """For people."""
        before, after = (sum(getattr(role, which) for role in self.roles.values()) for which in ("bytes_before", "bytes_after"))
        worst = max(self.roles, key=lambda name: self.roles[name].error)
        table = "" if self.table is None else ", table on the host" if self.table == "host" else f", table {self.table}"
        found = [
            f"weights {self.format}{table} under {self.activations or self.precision}, {after / before:.3f} of their bytes; "
            f"most is lost of {worst}: {self.roles[worst].error:.2%}"
        ]
        for name, error in self.outputs.items():
            found.append(
                f"{name}: {error.rms:.2%} off unquantized weights', cosine {error.cosine:.5f}, least {error.least_cosine:.5f}"
            )
        return found


def weights_name(component: ComponentName) -> str:
    """The file's name in a bundle."""
    return f"{component}/quantization.json"


def parse_weights(data: bytes, *, source: str) -> WeightReport:
    """Raises ManifestError."""
    return validate_json(WeightReport, data, source=source)
