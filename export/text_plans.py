"""Which plan a text encoder in W8A8 follows: a calibration's, that of a file, or one that needs neither.

As for the denoiser in INT8 (export/plans.py): without a calibration scales of activations are a token's own where that runs, which
is in ONNX Runtime, and come from the inputs of the parity check for TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.errors import SpecError
from engines.spec import ComponentName, ShapeRange, Target
from export.components import Component
from export.quantization_plan import PLAN, check_weights
from export.reference import loaded, run_module
from export.references import text_inputs
from export.request import BuildRequest
from export.stages import Runner
from export.text_calibration import calibrate_text
from sana_ref.quantization import QuantizationPlan, groups_of, load_plan, part_of
from sana_ref.quantized import InputRanges, check_plan, static_scale, uniform_plan
from sana_ref.variants import variant_of

__all__ = ["check_text", "left_out", "text_plan", "wants_text_plan"]


def wants_text_plan(request: BuildRequest) -> bool:
    """Not for sm90, where its weights stay as they are (export/weight_only.py)."""
    asked = request.weights.get("text_encoder") == "w8a8" and "text_encoder" in request.components
    return asked and Target.SM90 not in request.targets


def check_text(request: BuildRequest) -> None:
    """Before anything is loaded: raises SpecError for what text_plan could not follow."""
    if not wants_text_plan(request):
        return
    asked = request.quantization
    if asked is not None and asked.recipe.activations == "dynamic" and request.targets:
        raise SpecError(
            f"recipe {asked.name}, activations: got dynamic for {', '.join(request.targets)} with text_encoder w8a8; expected "
            "static: TensorRT quantises activations with a scale that is fixed in the engine. Set activations=static, or use "
            "--target onnx."
        )
    if request.plan is None:
        return
    layers = part_of(load_plan(request.plan), text=True).layers
    if not any(layer.format == "int8" for layer in layers.values()):
        raise SpecError(
            f"plan: got {request.plan} without a layer of the text encoder, which text_encoder w8a8 asks for; expected some in "
            "int8. Calibrate again with text_encoder=w8a8 (python -m export.calibrate), or set --recipe-key text_encoder=int8."
        )
    for group, layer in layers.items():
        if layer.format not in ("int8", "none"):
            raise SpecError(f"plan, {group}: got {layer.format}; expected int8 or none in the text encoder. Calibrate again.")


def left_out(request: BuildRequest) -> str | None:
    """For people: that a plan says something of the text encoder, which is not followed."""
    if request.plan is None or wants_text_plan(request) or "text_encoder" not in request.components:
        return None
    if not part_of(load_plan(request.plan), text=True).layers:
        return None
    why = "it has 16-bit weights on sm90" if Target.SM90 in request.targets else "--recipe-key text_encoder=w8a8 would take them"
    return f"plan: its layers of the text encoder are left out; {why}"


def text_plan(
    request: BuildRequest, runner: Runner, everything: Mapping[ComponentName, Component], ranges: ShapeRange
) -> QuantizationPlan:
    """Raises SpecError for a plan of another model, and what calibrate_text raises."""
    checkpoint, component = runner.checkpoint, everything["text_encoder"]
    groups = groups_of(name for name, _ in component.module.named_parameters())
    if request.quantization is not None:
        asked = request.quantization.of_variant(variant_of(checkpoint.transformer_config))
        folder = calibrate_text(
            checkpoint, asked.recipe, store=runner.store, progress=runner.progress, device=request.quantization.device
        )
        runner.progress.say(f"  what was seen in the text encoder: {folder / 'calibration.html'}")
        return load_plan(folder / PLAN)
    if request.plan is not None:
        plan = part_of(load_plan(request.plan), text=True)
        check_plan(plan, groups)
        return plan
    if not request.targets:
        return uniform_plan("int8", groups)
    inputs, depends = text_inputs(runner, ranges)

    def make() -> QuantizationPlan:
        module = loaded(component.module, runner.loader(component), component.dtype)
        check_weights(module.get_submodule("encoder"), dict.fromkeys(groups, "int8"))
        with InputRanges(module.get_submodule("encoder")) as found:
            for case in inputs.values():
                run_module(module, component, case)
        return uniform_plan("int8", groups, {group: static_scale("int8", each) for group, each in found.largest().items()})

    return runner.ranges(component, make, depends)
