"""What a build is asked for, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import NoGpuError, SpecError
from engines.gpu import current_target, device_info
from engines.spec import (
    AHEAD_OF_TIME_TARGETS,
    COMPONENTS,
    PX_PER_LATENT,
    ComponentName,
    Precision,
    ShapeRange,
    Target,
    check_precision,
    nearest,
    parse_targets,
)
from export.quantization_request import QuantizationRequest
from sana_ref.weight_only import TextFormat, TextPart

__all__ = ["BuildRequest", "parse_components", "shape_range", "targets_of"]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """model: a folder, an id, or a .pth. targets: empty for portable graphs alone. sides in px, None: from the model's own size."""

    model: str
    out: Path
    precision: Precision
    targets: tuple[Target, ...]
    revision: str | None = None
    variant: str | None = None
    components_from: str | None = None
    vae: Path | None = None
    min_side: int | None = None
    opt_side: int | None = None
    max_side: int | None = None
    max_batch: int = 4
    components: tuple[ComponentName, ...] = COMPONENTS
    cache: Path | None = None
    quantization: QuantizationRequest | None = None  # of the denoiser, by a calibration
    decoder_precision: Precision | None = None  # None: export/plans.py
    weights: Mapping[TextPart, TextFormat] = field(default_factory=dict)  # of the text's components (export/weight_only.py)
    plan: Path | None = None  # of a quantized denoiser, made before; neither: one without a calibration (export/plans.py)


def parse_components(text: str) -> tuple[ComponentName, ...]:
    """Names joined by commas, in the order in which a picture passes through them. Raises SpecError for an unknown one."""
    words = {word.strip() for word in text.split(",")}
    for word in sorted(words - set(COMPONENTS)):
        raise SpecError(f"components: got {word!r}; {nearest(word, COMPONENTS)}.")
    return tuple(name for name in COMPONENTS if name in words)


def targets_of(text: str, precision: Precision = Precision.FP16) -> tuple[Target, ...]:
    """As engines.spec.parse_targets, but "current" raises NoGpuError where there is none, which says why and what to do.

    precision: what is to be built; the message names architectures that have it. What a GPU has not is said first, where its
    engines are compiled on it alone: there it would be refused too.
    """

    def fits(target: Target) -> bool:
        try:
            check_precision(precision, [target])
        except SpecError:
            return False
        return True

    def current() -> Target | None:
        try:
            device_info()
        except NoGpuError as error:
            names = ",".join(target for target in AHEAD_OF_TIME_TARGETS if fits(target))
            raise NoGpuError(
                f"--target current: {error} To build without a GPU, name architectures ({names}), or "
                "take onnx: portable graphs alone."
            ) from None
        return current_target()

    for word in (each.strip() for each in text.split(",")):
        if word in set(Target) and word not in AHEAD_OF_TIME_TARGETS:
            check_precision(precision, [Target(word)])
    return parse_targets(text, current=current)


def shape_range(request: BuildRequest, *, trained_side: int, max_sequence_length: int) -> ShapeRange:
    """The sizes that the engines serve.

    Unless told otherwise: half to twice the side that the model was trained for, which holds all of its published aspect ratios.
    Raises SpecError for sides that are not multiples of 32 px or out of order.
    """
    opt = trained_side if request.opt_side is None else request.opt_side
    least = max(PX_PER_LATENT, opt // 2 // PX_PER_LATENT * PX_PER_LATENT) if request.min_side is None else request.min_side
    most = 2 * opt if request.max_side is None else request.max_side
    for flag, side in (("--min-side", least), ("--default-side", opt), ("--max-side", most)):
        if side <= 0 or side % PX_PER_LATENT:
            low = max(PX_PER_LATENT, side // PX_PER_LATENT * PX_PER_LATENT)
            raise SpecError(f"{flag}: got {side} px; expected a multiple of {PX_PER_LATENT}. Use {low} or {low + PX_PER_LATENT}.")
    if not least <= opt <= most:
        raise SpecError(f"sides: got {least} (min), {opt} (default) and {most} px (max); expected them in this order.")
    if not 1 <= request.max_batch <= 1024:
        raise SpecError(f"--max-batch: got {request.max_batch}; expected 1 to 1024 pictures.")
    return ShapeRange(
        min_side=least, opt_side=opt, max_side=most, max_batch=request.max_batch, max_sequence_length=max_sequence_length
    )
