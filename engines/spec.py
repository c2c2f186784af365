"""The words in which a build is asked for: components, precisions, GPU targets, and ranges of shapes.

Everything here is data. Which combinations of it exist is checked where the words are parsed, so that a wrong word is refused
before anything is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.errors import SpecError

__all__ = [
    "AHEAD_OF_TIME_TARGETS",
    "COMPONENTS",
    "FP8_TARGETS",
    "LEVELS",
    "NOT_FINITE",
    "PX_PER_LATENT",
    "QUANTIZED",
    "ComponentName",
    "Precision",
    "ShapeRange",
    "Target",
    "check_precision",
    "component_precision",
    "nearest",
    "parse_precision",
    "parse_targets",
]

PX_PER_LATENT = 32  # DC-AE f32: one latent cell covers 32 x 32 px
LEVELS, NOT_FINITE = "levels", "not_finite"  # what decoders' engines give beside images: export/level_nodes.py

ComponentName = Literal["text_encoder", "text_projection", "denoiser", "decoder"]  # in the order of a picture
COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


class Target(StrEnum):
    """A GPU architecture, named by its compute capability."""

    SM80 = "sm80"  # A100
    SM86 = "sm86"  # RTX 30
    SM89 = "sm89"  # RTX 40, L4, L40S
    SM90 = "sm90"  # H100, H200
    SM100 = "sm100"  # B200
    SM120 = "sm120"  # RTX 50
    SM121 = "sm121"  # GB10


# TensorRT for RTX compiles for these on any machine. An engine for another architecture is compiled on that GPU, as "current".
AHEAD_OF_TIME_TARGETS = (Target.SM80, Target.SM86, Target.SM89, Target.SM120, Target.SM121)

QUANTIZED = (Precision.INT8, Precision.FP8, Precision.NVFP4)  # of the denoiser's linear layers, which are fp16 otherwise
FP8_TARGETS = tuple(target for target in Target if target not in (Target.SM80, Target.SM86))
_FP4_TARGETS = (Target.SM120, Target.SM121)


def nearest(word: str, valid: Iterable[str]) -> str:
    """A sentence that names the valid words, the nearest first: the end of a message about an unknown one."""
    words = [str(w) for w in valid]
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Valid: {', '.join(words)}"


def parse_precision(text: str) -> Precision:
    """The precision that `text` names. Raises SpecError for an unknown one."""
    if text not in set(Precision):
        raise SpecError(f"precision: got {text!r}; {nearest(text, Precision)}.")
    return Precision(text)


def component_precision(precision: Precision) -> dict[ComponentName, Precision]:
    """The precision of each component in a build at `precision`.

    fp16 is for the denoiser and the text projection, which is a part of its network: Gemma-2's activations pass fp16's largest
    number (65504), and DC-AE decodes to noise in it. int8, fp8 and nvfp4 are for the denoiser alone, which is fp16 otherwise; that
    fp8 is also for the decoder depends on the targets, and int8 is where it is asked for (export/plans.py).
    """
    half = precision is Precision.FP16 or precision in QUANTIZED
    others = Precision.BF16 if half else precision
    projection = Precision.FP16 if half else precision
    return {"text_encoder": others, "text_projection": projection, "denoiser": precision, "decoder": others}


def check_precision(precision: Precision, targets: Iterable[Target]) -> None:
    """Raises SpecError if `precision` cannot be built for one of the architectures, naming what can.

    INT8 runs on all of them, FP8 on sm89 and later, NVFP4 on sm120 and sm121. On sm90 FP8 is cuBLASLt's, in a graph of its own.
    """
    targets = tuple(targets)
    old = [target for target in targets if target not in FP8_TARGETS]
    if precision is Precision.FP8 and old:
        raise SpecError(
            f"precision: got fp8 for {', '.join(old)}; expected sm89 or later: FP8 needs its hardware. "
            f"Use --precision {Precision.INT8} there."
        )
    if precision is Precision.FP8 and Target.SM90 in targets and len(targets) > 1:
        raise SpecError(
            f"precision: got fp8 for {', '.join(targets)}; expected sm90 alone: FP8 runs through cuBLASLt there, whose layers are "
            f"not those of the others. Build two bundles, or use --precision {Precision.INT8}."
        )
    without = [target for target in targets if target not in _FP4_TARGETS]
    if precision is Precision.NVFP4 and without:
        instead = Precision.INT8 if set(without) & {Target.SM80, Target.SM86} else Precision.FP8
        raise SpecError(
            f"precision: got nvfp4 for {', '.join(without)}; expected {' or '.join(_FP4_TARGETS)}, which have FP4 hardware. "
            f"Use --precision {instead} there."
        )


def parse_targets(text: str, *, current: Callable[[], Target | None] | None = None) -> tuple[Target, ...]:
    """The GPU architectures that `text` names, ascending, each once.

    text: "onnx" (portable graphs only: the empty tuple), "current" (the GPU that is there), or names joined by commas.
    current: finds the architecture of the GPU that is there; engines.tensorrt.current_target unless given.
    Raises SpecError for an unknown name, and for an architecture that can only be built on its own GPU; whatever `current` raises.
    """
    words = [word.strip() for word in text.split(",")]
    if words == ["onnx"]:
        return ()
    found: set[Target] = set()
    for word in words:
        if word == "current":
            found.add(_current_target(current))
        elif word == "onnx":
            raise SpecError(
                f"target: got {text!r}; 'onnx' means no engine at all, so it stands alone. Leave it out, or the others."
            )
        elif word not in set(Target):
            raise SpecError(f"target: got {word!r}; {nearest(word, [*Target, 'current', 'onnx'])}.")
        elif word not in AHEAD_OF_TIME_TARGETS:
            raise SpecError(
                f"target: got {word!r}; TensorRT for RTX compiles ahead of time for {', '.join(AHEAD_OF_TIME_TARGETS)} only. "
                f"Build on that GPU with the target 'current'."
            )
        else:
            found.add(Target(word))
    return tuple(sorted(found, key=list(Target).index))


def _current_target(current: Callable[[], Target | None] | None) -> Target:
    if current is None:
        from engines.tensorrt import current_target  # only here: it looks for a driver

        current = current_target
    target = current()
    if target is None:
        raise SpecError(
            "target: got 'current', and this machine has no GPU. "
            f"Name what to compile for ({', '.join(AHEAD_OF_TIME_TARGETS)}), or use 'onnx' for portable graphs alone."
        )
    return target


Side = Annotated[int, Field(ge=PX_PER_LATENT, le=16384, multiple_of=PX_PER_LATENT)]  # px; 16384 px are 512 latent cells


class ShapeRange(BaseModel):
    """The shapes that one engine serves. Width and height are independent: every aspect ratio within the sides is served."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_side: Side  # px
    opt_side: Side  # px; what the engine is tuned for, and the size of a picture when none is asked for
    max_side: Side  # px
    max_batch: int = Field(ge=1, le=1024)  # images per call; guidance doubles them inside the graph
    max_sequence_length: int = Field(ge=1, le=8192)  # prompt tokens that the denoiser sees

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min_side <= self.opt_side <= self.max_side:
            raise ValueError(f"sides: got {self.min_side}, {self.opt_side}, {self.max_side} px; expected min <= opt <= max")
        return self
