"""`--precision nvfp4` and its relatives: which recipe a build calibrates by, what it refuses, and what its bundle says of it."""

from pathlib import Path

import pytest
import torch
from tiny_build import cache, quiet, request, said, shared, tiny
from tiny_checkpoint import write_checkpoint
from tiny_recipes import SHORT, command, prompts, recipe

from apps.cli.inspect import read_quantization
from apps.cli.main import main as sana
from engines.bundle import Bundle
from engines.errors import ConfigError, SpecError
from engines.quantization_report import RECIPE_NAME
from engines.spec import Precision, Target
from engines.store import Store
from export import calibrators
from export.quantization_request import QuantizationRequest, quantization_of
from export.quantize import check_formats, quantize
from export.recipe import load_recipe
from export.settings import load
from sana_ref import checkpoint as checkpoints
from sana_ref.quantization import groups_of

KEYS = [word for key in SHORT for word in ("--recipe-key", key)]
NUM_GROUPS = 6


def of(**flags: object) -> tuple[Precision, QuantizationRequest | None]:
    return quantization_of(load(flags=flags))


def run(name: str, *, targets: tuple[Target, ...] = (), keys: tuple[str, ...] = (), **options: object):
    """quantize() of the tiny checkpoint, and what it said."""
    made = recipe(name, *keys)
    asked = QuantizationRequest(recipe=made, name=name, **options)  # type: ignore[arg-type]
    wanted = request(shared() / "never", precision=Precision(made.format), targets=targets, quantization=asked)
    progress = quiet()
    return quantize(wanted, asked, checkpoints.load(tiny()), Store(cache()), progress), said(progress)


@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4"])
def test_a_precision_is_the_recipe_of_that_name(name):
    precision, asked = of(precision=name)
    assert precision == name
    assert asked is not None
    assert (asked.recipe, asked.name, asked.budget) == (load_recipe(name), name, None)


def test_what_needs_no_calibration(tmp_path):
    assert of(precision="fp16") == (Precision.FP16, None)
    assert of(precision="int8", calibrate=False) == (Precision.INT8, None)
    assert of(precision="nvfp4", plan=tmp_path / "plan") == (Precision.NVFP4, None)


def test_keys_prompts_and_formats(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults:\n  - quantization/nvfp4@_global_\n  - _self_\nlow_rank: 4\n", encoding="utf-8")
    flags = {"recipe_keys": ["calibration.num_prompts=3", "awq=[0.0,0.5]"], "calibration_prompts": tmp_path / "p.txt"}
    precision, asked = of(precision=str(mine), budget="size<=0.4", **flags)
    assert asked is not None
    assert (precision, asked.name, asked.recipe.low_rank, asked.recipe.awq) == (Precision.NVFP4, "mine", 4, (0.0, 0.5))
    assert (asked.recipe.calibration.num_prompts, asked.recipe.calibration.prompts) == (3, tmp_path / "p.txt")
    assert asked.offered == ("nvfp4", "fp8")
    _, asked = of(precision="int8", budget="size<=0.4", budget_formats="int8,nvfp4")
    assert asked is not None
    assert asked.offered == ("int8", "nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"precision": "fp16", "budget": "size<=0.4"}, "budget: got size<=0.4 with --precision fp16; expected one of int8, fp8"),
        ({"precision": "bf16", "calibration_prompts": Path("p")}, "calibration-prompts: got p with --precision bf16"),
        ({"precision": "int8", "calibrate": False, "budget": "size<=0.4"}, "budget: got size<=0.4 with --no-calibrate"),
        ({"precision": "int8", "plan": Path("p"), "recipe_keys": ["a=1", "b=2"]}, "recipe-key: got a=1,b=2 with --plan"),
        ({"precision": "mine.yaml", "calibrate": False}, "precision: got mine.yaml with --no-calibrate"),
        ({"precision": "mine.yaml"}, "mine.yaml: no such recipe"),
        ({"precision": "int8", "budget": "lpipss<=1"}, "got the metric 'lpipss'; did you mean 'lpips'"),
        ({"precision": "int8", "budget_formats": "int8"}, "budget-formats: got int8 with no --budget"),
        ({"precision": "int8", "budget": "size<=1", "budget_formats": "int9"}, "got 'int9'; did you mean 'int8'"),
        ({"precision": "int8", "recipe_keys": ["methd=mse"]}, "did you mean 'method'"),
        ({"precision": "int8", "recipe_keys": ["format=none"]}, "which quantises nothing"),
    ],
)
def test_words_that_do_not_go_together(flags, words):
    with pytest.raises((SpecError, ConfigError), match=words):
        of(**flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_devices():
    _, asked = of(precision="int8")
    assert asked is not None
    assert asked.device == "cpu"
    with pytest.raises(SpecError, match="device: got cuda, and PyTorch sees no GPU"):
        of(precision="int8", device="cuda")


@pytest.mark.slow
def test_a_build_calibrates_and_its_bundle_says_so(tmp_path, capsys):
    words = ["--precision", "int8", *KEYS, "--calibration-prompts", str(prompts()), "--recipe-out", str(tmp_path / "used.yaml")]
    words += ["--cache", str(tmp_path / "cache")]  # not that of other tests, which may have calibrated so: then nothing is said
    assert command(tmp_path / "b", *words) == 0
    heard = capsys.readouterr().err
    for line in (
        "calibration: sampling runs",
        "calibration: activations",
        "calibration: scales",
        "2 prompts, 2 steps each, on cpu",
    ):
        assert line in heard
    assert f"of {NUM_GROUPS} groups of layers 6 int8; calibrated by the recipe int8 on 2 prompts" in heard

    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.precision == {"denoiser": "int8"}
    report = read_quantization(bundle)
    assert report is not None
    assert list(report.formats) == list(groups_of(checkpoints.load(tiny()).sources["transformer"].shapes))
    assert str(tmp_path) not in bundle.file(RECIPE_NAME).read_text(encoding="utf-8")
    again = load_recipe(bundle.file(RECIPE_NAME))
    assert again == recipe().model_copy(update={"calibration": again.calibration})
    assert load_recipe(tmp_path / "used.yaml") == recipe()

    assert sana(["inspect", str(tmp_path / "b")]) == 0
    assert "calibrated by the recipe int8 on 2 prompts" in capsys.readouterr().out

    copied = tmp_path / "the same prompts elsewhere.txt"
    copied.write_bytes(prompts().read_bytes())
    words[words.index(str(prompts()))] = str(copied)
    assert command(tmp_path / "b", *words) == 0
    heard = capsys.readouterr().err
    assert "nothing changed, nothing done" in heard
    assert "calibration                             unchanged, nothing done" in heard


@pytest.mark.slow
def test_a_build_without_a_calibration_says_so(tmp_path, capsys):
    assert command(tmp_path / "b", "--precision", "int8", "--no-calibrate") == 0
    heard = capsys.readouterr().err
    assert "calibration:" not in heard
    assert "not calibrated: a scale a token" in heard
    assert RECIPE_NAME not in Bundle.open(tmp_path / "b").manifest.files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibration-prompts", "/no/such.txt"], "/no/such.txt: calibration prompts cannot be read"),
        (["--calibration-prompts", "two", "--recipe-key", "calibration.num_prompts=3"], "got 2 calibration prompts; expected 3"),
        (["--recipe-key", "keep=[transformer_blocks.0.attn2.to_k]"], "nearest is 'transformer_blocks.0.attn2.to_q'"),
        (["--recipe-key", "keep=['*']"], "recipe nvfp4: got no group that is quantised"),
        (["--recipe-key", "activations=dynamic", "--recipe-key", "format=int8", "--target", "sm80"], "got dynamic for sm80"),
        (["--target", "sm89"], "got nvfp4 for sm89; expected sm120 or sm121, which have FP4 hardware. Use --precision fp8"),
        (
            ["--target", "sm80,sm120", "--recipe-key", "format=int8", "--recipe-key", "formats=[{groups:'*.ff.*',format:fp8}]"],
            "recipe nvfp4, transformer_blocks.0.ff.conv_inverted: precision: got fp8 for sm80; expected sm89 or later",
        ),
    ],
)
def test_bad_input_is_answered_before_anything_is_drawn(tmp_path, capsys, words, message):
    words = [str(prompts()) if word == "two" else word for word in words]
    assert command(tmp_path / "b", "--precision", "nvfp4", "--calibration-prompts", str(prompts()), *words) == 2
    heard = capsys.readouterr().err
    assert message in heard
    assert "sampling runs" not in heard


def test_a_modelopt_that_was_not_tested(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrators, "version", lambda name: "0.99.1")
    assert command(tmp_path / "b", "--precision", "int8", *KEYS, "--calibration-prompts", str(prompts())) == 2
    assert "nvidia-modelopt: got 0.99.1, which was not tested; expected 0.47" in capsys.readouterr().err


def test_formats_that_no_target_has_together():
    check_formats(["fp8", "nvfp4", "none"], (Target.SM120,))
    check_formats(["fp8", "none"], (Target.SM90,))
    with pytest.raises(SpecError, match="got fp8 and int8 together for sm90"):
        check_formats(["fp8", "int8"], (Target.SM90,))


def test_fp8_by_cublas_has_scales_where_kernels_take_them():
    """Smoothing has no node there: it is left out, and said."""
    made, heard = run("fp8", targets=(Target.SM90,), keys=("smoothquant=0.5",))
    assert "the recipe's smoothing and dynamic activations do not apply there" in heard
    assert not made.plan.tensors
    static = {group.partition("0.")[2] for group, layer in made.plan.layers.items() if layer.input_scale is not None}
    assert static == {"attn1.to_out.0", "attn2.to_out.0", "ff.conv_point"}


def test_a_checkpoint_without_prompts_of_its_own_takes_those_that_ship(tmp_path):
    folder = write_checkpoint(tmp_path)
    made = load_recipe("int8", list(SHORT))
    from export.calibration_data import plan_runs
    from export.calibration_prompts import SHIPPED, read_prompts

    specs = plan_runs(checkpoints.load(folder), made.calibration)
    assert [spec.prompt for spec in specs] == list(read_prompts(SHIPPED, 2))
