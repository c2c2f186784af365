"""Which plan a quantized build follows: the one that it was given, or one that needs no calibration.

A calibration (`--plan`) knows the activations of real pictures. Without one, scales of INT8 and FP8 activations are found a token
at a time where that runs, which is in ONNX Runtime; TensorRT's scales are fixed in the engine, and then come from the largest
activations in the inputs that parity is checked with. That is enough to build and to check, and less than a calibration is.
FP8 in the decoder always has those; INT8, with less room, those of a calibration's pictures where there is one.
"""

from collections.abc import Mapping, Sequence

import torch

from engines.errors import SpecError
from engines.spec import FP8_TARGETS, QUANTIZED, ComponentName, Precision, ShapeRange, Target, check_precision, component_precision
from export.components import Component
from export.decoder_scales import calibrated_convs
from export.fp8_nodes import has_static_scale
from export.qdq_nodes import is_dynamic
from export.quantization_plan import check_weights
from export.reference import loaded, run_module
from export.references import decoder_inputs, denoiser_inputs
from export.request import BuildRequest
from export.stages import Runner
from sana_ref.quantization import Format, LayerPlan, QuantizationPlan, groups_of, load_plan, part_of
from sana_ref.quantize_ops import BLOCK, Rows
from sana_ref.quantized import MARGIN, InputRanges, check_plan, static_scale, uniform_plan
from sana_ref.quantized_convs import MARGINS, ConvRanges, conv_plan
from sana_ref.variants import variant_of

__all__ = [
    "CONV_TARGETS",
    "check_request",
    "decoder_plan",
    "decoder_precision",
    "denoiser_plan",
    "for_cublas",
    "is_cublas",
    "usual_decoder",
]

_FORMATS: dict[Precision, Format] = {Precision.INT8: "int8", Precision.FP8: "fp8", Precision.NVFP4: "nvfp4"}
# Of the decoder's convolutions: what has such numbers in hardware.
CONV_TARGETS: Mapping[Precision, tuple[Target, ...]] = {Precision.FP8: FP8_TARGETS, Precision.INT8: tuple(Target)}


def check_request(request: BuildRequest) -> None:
    """Before anything is loaded: raises SpecError for a plan that is none, or what the precision or a target cannot have."""
    decoder_precision(request)
    if request.plan is None:
        return
    if request.precision not in QUANTIZED:
        raise SpecError(
            f"plan: got {request.plan} with --precision {request.precision}; expected one of {', '.join(QUANTIZED)}. "
            "Leave the plan out, or name its precision."
        )
    plan = load_plan(request.plan)
    text, plan = part_of(plan, text=True), part_of(plan, text=False)
    if is_cublas(request):
        _check_cublas(plan)
        return
    formats = {layer.format for layer in plan.layers.values()} - {"none"}
    if _FORMATS[request.precision] not in formats:
        raise SpecError(
            f"plan: got {request.plan} with {', '.join(sorted(formats)) or 'no quantized layer'}; expected some "
            f"{request.precision}, as --precision says."
        )
    for name in sorted(formats):
        check_precision(Precision(name), request.targets)
    for group, layer in {**plan.layers, **text.layers}.items():
        if request.targets and is_dynamic(layer):
            raise SpecError(
                f"plan, {group}: got {layer.format} without input_scale for {', '.join(request.targets)}; expected one: TensorRT "
                "quantises activations with a scale that is fixed in the engine. Calibrate it, or use --target onnx."
            )


def denoiser_plan(
    request: BuildRequest, runner: Runner, everything: Mapping[ComponentName, Component], ranges: ShapeRange
) -> QuantizationPlan:
    """Of the denoiser. Raises SpecError for a plan of another model."""
    component, kind = everything["denoiser"], _FORMATS[request.precision]
    parameters = dict(component.module.named_parameters())
    groups = groups_of(parameters)
    if request.plan is not None:
        plan = part_of(load_plan(request.plan), text=False)
        check_plan(plan, groups)
        return for_cublas(plan) if is_cublas(request) else plan
    if not request.targets and kind != "nvfp4":
        return uniform_plan(kind, groups)
    cases, depends = denoiser_inputs(runner, everything, ranges)
    formats: dict[str, Format] = {
        group: kind if _fits(kind, parameters[names[0]].shape) else "none" for group, names in groups.items()
    }

    def make() -> QuantizationPlan:
        module = loaded(component.module, runner.loader(component), component.dtype)
        check_weights(module.get_submodule("transformer"), formats)
        with InputRanges(module.get_submodule("transformer")) as found:
            for inputs in cases().values():
                run_module(module, component, inputs)
        largest = found.largest()
        if is_cublas(request):
            scales = {group: static_scale(kind, MARGIN * each) for group, each in largest.items()}
            return for_cublas(uniform_plan(kind, groups, scales))
        layers = {
            group: LayerPlan(format=kind, input_scale=static_scale(kind, largest[group]))
            if each == kind
            else LayerPlan(format="none")
            for group, each in formats.items()
        }
        return QuantizationPlan(layers=layers, notes={"method": "largest activation in the inputs of the parity check"})

    plan = runner.ranges(component, make, depends)
    for group, layer in plan.layers.items():
        if layer.format == "none":
            depth = parameters[groups[group][0]].shape[1]
            runner.progress.say(f"  {group} stays fp16: its depth of {depth} is no multiple of {BLOCK}, which share a scale")
    return plan


def usual_decoder(precision: Precision, targets: Sequence[Target]) -> Precision:
    """The decoder's in a build that asks for none: FP8 where the denoiser is FP8 or NVFP4 and every target has it.

    Not INT8 beside INT8: its kernels have not run on a GPU (docs/quantization.md).
    """
    fits = precision in (Precision.FP8, Precision.NVFP4) and bool(targets) and set(targets) <= set(FP8_TARGETS)
    return Precision.FP8 if fits else component_precision(precision)["decoder"]


def decoder_precision(request: BuildRequest) -> Precision:
    """The one that is asked for, or the usual one.

    Raises SpecError for another than the build's precision that is neither FP8 nor INT8, and for those where they cannot be.
    """
    usual, asked = component_precision(request.precision)["decoder"], request.decoder_precision
    if asked is None:
        return usual_decoder(request.precision, request.targets)
    if asked is usual:
        return usual
    if asked not in CONV_TARGETS or usual is not Precision.BF16:
        raise SpecError(
            f"decoder-precision: got {asked} with --precision {request.precision}; expected {usual}"
            f"{', fp8 or int8' if usual is Precision.BF16 else ''}. Leave it out, or take another --precision."
        )
    able = CONV_TARGETS[asked]
    lacking = [target for target in request.targets if target not in able]
    if lacking or not request.targets:
        raise SpecError(
            f"decoder-precision: got {asked} for {', '.join(lacking) or 'onnx'}; expected some of {', '.join(able)}: "
            f"{asked.upper()} convolutions are kernels of an engine, which need their hardware. "
            f"Use {'int8 or bf16' if lacking else 'bf16'} there."
        )
    return asked


def decoder_plan(request: BuildRequest, runner: Runner, component: Component, ranges: ShapeRange) -> QuantizationPlan:
    """Of a decoder in FP8 or INT8: every group. Scales leave room for MARGINS times the largest inputs in the parity check's cases;
    those of INT8 are the pictures' own in a build that calibrates its denoiser."""
    kind: Rows = "int8" if component.precision is Precision.INT8 else "fp8"
    if kind == "int8" and request.quantization is not None and "denoiser" in request.components:
        asked = request.quantization.of_variant(variant_of(runner.checkpoint.transformer_config))
        return calibrated_convs(runner, asked, kind)
    cases, depends = decoder_inputs(runner, ranges)

    def make() -> QuantizationPlan:
        module = loaded(component.module, runner.loader(component), component.dtype)
        with ConvRanges(module) as found:
            for inputs in cases().values():
                run_module(module, component, inputs)
        return conv_plan(kind, found.largest(), MARGINS[kind])

    return runner.ranges(component, make, depends)


def is_cublas(request: BuildRequest) -> bool:
    """Whether cuBLASLt multiplies the quantized layers (export/fp8_nodes.py)."""
    return request.precision is Precision.FP8 and request.targets == (Target.SM90,)


def _check_cublas(plan: QuantizationPlan) -> None:
    """Raises SpecError for what cuBLASLt's nodes have not."""
    wrong = sorted(plan.tensors) or sorted(group for group, layer in plan.layers.items() if layer.format not in ("none", "fp8"))
    if wrong:
        raise SpecError(
            f"plan, {wrong[0]}: got what fp8 on sm90 has not; expected formats fp8 and none, and neither smoothing, a low-rank "
            "branch nor scales of weights. Calibrate with a recipe that has none of these, or leave the plan out."
        )


def for_cublas(plan: QuantizationPlan) -> QuantizationPlan:
    """Scales of activations where a kernel is given one; elsewhere each token's own is found, which is more exact."""
    layers = {
        group: layer if has_static_scale(group) else LayerPlan(format=layer.format, input_scale=None)
        for group, layer in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


def _fits(kind: Format, shape: torch.Size) -> bool:
    return kind != "nvfp4" or shape[1] % BLOCK == 0
