import pytest
from pydantic import ValidationError

from engines.errors import SpecError
from engines.spec import Precision, ShapeRange, Target, check_precision, component_precision, parse_precision, parse_targets

RANGE = {"min_side": 256, "opt_side": 512, "max_side": 1024, "max_batch": 2, "max_sequence_length": 300}


def test_fp16_is_for_the_transformer_alone():
    assert component_precision(Precision.FP16) == {
        "text_encoder": "bf16",
        "text_projection": "fp16",
        "denoiser": "fp16",
        "decoder": "bf16",
    }
    assert set(component_precision(Precision.BF16).values()) == {"bf16"}
    assert set(component_precision(Precision.FP32).values()) == {"fp32"}


@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4"])
def test_quantized_is_the_denoiser_alone(name):
    others = {"text_encoder": "bf16", "text_projection": "fp16", "decoder": "bf16"}
    assert component_precision(parse_precision(name)) == {**others, "denoiser": name}


SM = {target.value: target for target in Target}


@pytest.mark.parametrize(
    ("precision", "targets"),
    [
        ("int8", list(SM)),
        ("fp8", ["sm89", "sm100", "sm120", "sm121"]),
        ("fp8", ["sm90"]),
        ("nvfp4", ["sm120", "sm121"]),
        *((precision, []) for precision in Precision),
    ],
)
def test_what_a_target_runs(precision, targets):
    check_precision(Precision(precision), [SM[name] for name in targets])


@pytest.mark.parametrize(
    ("precision", "targets", "words"),
    [
        ("fp8", "sm80 sm86 sm89", "got fp8 for sm80, sm86; expected sm89 or later: .* Use --precision int8 there"),
        ("fp8", "sm89 sm90", "got fp8 for sm89, sm90; expected sm90 alone: .*cuBLASLt"),
        ("nvfp4", "sm89 sm120", "got nvfp4 for sm89; expected sm120 or sm121, which have FP4 hardware. Use --precision fp8 there"),
        ("nvfp4", "sm86", "got nvfp4 for sm86; .* Use --precision int8 there"),
        ("nvfp4", "sm90", "got nvfp4 for sm90; .* Use --precision fp8 there"),
    ],
)
def test_what_a_target_cannot_run_names_what_it_can(precision, targets, words):
    with pytest.raises(SpecError, match=words):
        check_precision(Precision(precision), [SM[name] for name in targets.split()])


def test_unknown_precision_names_the_nearest():
    with pytest.raises(SpecError, match=r"got 'f16'; did you mean 'fp16'\? Valid: fp32, fp16, bf16"):
        parse_precision("f16")


def test_targets_are_sorted_and_each_is_once():
    assert parse_targets("sm120, sm80,sm120") == (Target.SM80, Target.SM120)
    assert parse_targets("onnx") == ()


def test_current_target_is_the_gpu_that_is_there():
    assert parse_targets("current", current=lambda: Target.SM90) == (Target.SM90,)
    assert parse_targets("sm80,current", current=lambda: Target.SM90) == (Target.SM80, Target.SM90)
    with pytest.raises(SpecError, match="this machine has no GPU"):
        parse_targets("current", current=lambda: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sm81", r"got 'sm81'; did you mean 'sm80'\?|Valid:"),
        ("", "got ''; Valid: sm80"),
        ("sm80,", "got ''"),
        ("sm90", "compiles ahead of time for sm80, sm86, sm89, sm120, sm121 only. Build on that GPU"),
        ("sm80,onnx", "stands alone"),
    ],
)
def test_bad_targets_are_refused(text, words):
    with pytest.raises(SpecError, match=words):
        parse_targets(text)


@pytest.mark.parametrize(
    "change", [{"min_side": 250}, {"min_side": 0}, {"min_side": 768}, {"max_batch": 0}, {"max_side": 1 << 20}, {"x": 1}]
)
def test_bad_ranges_are_refused(change):
    ShapeRange(**RANGE)
    with pytest.raises(ValidationError):
        ShapeRange(**RANGE | change)
