"""What a picture says about how it was drawn: enough to draw it again. Travels inside the PNG as one JSON text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.strict import validate_json
from runtime.noise import MAX_SEED
from runtime.prompt import MAX_PROMPT_CHARACTERS
from runtime.schedule import MAX_STEPS, Recipe, SchedulerName, SpacingName

__all__ = ["MAX_INFO_BYTES", "PictureInfo", "RecipeInfo", "parse_picture_info"]

MAX_INFO_BYTES = 4 << 20  # two prompts of 100,000 characters, each escaped to its longest, and some more

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Side = Annotated[int, Field(ge=32, le=16384, multiple_of=32)]  # px
Name = Annotated[str, Field(max_length=4096)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RecipeInfo(_Model):
    """runtime.schedule.Recipe without what belongs to the model."""

    scheduler: SchedulerName
    num_steps: int = Field(ge=1, le=MAX_STEPS)
    flow_shift: Positive = 3.0
    spacing: SpacingName | Annotated[tuple[Positive, ...], Field(min_length=1, max_length=MAX_STEPS)] = "linear"
    max_timestep: Positive | None = None
    intermediate_timestep: Positive | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> RecipeInfo:
        return cls.model_validate({name: getattr(recipe, name) for name in cls.model_fields})

    def recipe(self) -> Recipe:
        return Recipe(**self.model_dump())


class PictureInfo(_Model):
    """One picture's request, and where it was drawn. The same bundle, backend and device give the same pixels again."""

    format: Literal[1] = 1
    prompt: Prompt
    negative_prompt: Prompt
    seed: int = Field(ge=0, le=MAX_SEED)
    guidance: Annotated[float, Field(allow_inf_nan=False)]
    width: Side
    height: Side
    schedule: RecipeInfo
    model: Name
    bundle_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    backend: Literal["tensorrt", "onnxruntime"]
    device: Name
    batch_size: int = Field(ge=1, le=1024)  # pictures drawn in one go: kernels, and so the last bits, depend on it
    batch_index: int = Field(ge=0, le=1023)  # this picture's place among them
    program: Name  # what drew it, with its version


def parse_picture_info(text: str, *, source: str) -> PictureInfo:
    """Raises ManifestError, naming `source`, for text that is too long, not strict JSON, or not what the schema says."""
    return validate_json(PictureInfo, text.encode("utf-8", "surrogatepass")[: MAX_INFO_BYTES + 1], source=source)
