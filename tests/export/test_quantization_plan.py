"""From runs to a plan: what observers see, which scales follow, that corrections help, and the same bits twice."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_build import quiet
from tiny_checkpoint import write_checkpoint

from engines.errors import CheckpointError, ConfigError, SpecError
from engines.store import Store
from export import calibrators
from export.calibrate import main as calibrate_command
from export.calibration import observe
from export.calibration_data import draw_all, plan_runs
from export.calibration_report import CalibrationReport
from export.calibrators import largest_for_scale
from export.quantization_plan import calibrate, low_rank, make_plan, plan_layer, smoothing
from export.recipe import load_recipe
from sana_ref import checkpoint as checkpoints
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import load_plan
from sana_ref.quantize_ops import round_static
from sana_ref.quantized import InputRanges, QuantizedLinears

SMALL = ["calibration.num_prompts=2", "calibration.steps=2", "calibration.sizes=[[64,64],[96,64]]", "calibration.rows=10"]
QKV = "transformer_blocks.0.attn1.to_qkv"


def write(folder: Path) -> Path:
    """With prompts of its own, short enough for its 24 tokens."""
    path = write_checkpoint(folder)
    (path / "calibration_prompts.txt").write_text("a cat\na dog\nein Hund\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def seen(reference, store):
    """Runs and what was observed in them."""
    specs = plan_runs(reference.checkpoint, load_recipe("int8", SMALL).calibration)
    runs = draw_all(reference, specs, store, quiet())
    return runs, observe(reference, runs, rows=10, store=store, progress=quiet())


def test_ranges_are_those_that_the_simulation_sees(reference, seen):
    """InputRanges looks at the products themselves, this at what goes into the layers."""
    runs, statistics = seen
    with InputRanges(reference.denoiser.transformer) as ranges:
        for run in runs:
            text = reference.encode_text([run.spec.prompt], "", run.spec.guidance)
            for step, row in enumerate(reference.schedule(None, 2).table):
                latents = run.latents[step : step + 1]
                reference.step(latents, torch.zeros_like(latents), row, text, guidance=run.spec.guidance)
    assert {group: float(statistics.channels(group).amax()) for group in statistics.groups} == ranges.largest()
    for group in statistics.groups:
        assert statistics.steps(group).shape == (2, 2, 2)  # runs, steps, texts
        assert statistics.steps(group).amax() == statistics.channels(group).amax()


def test_rows_are_evenly_spaced_tokens_of_the_whole_run(reference, seen):
    """The first group's input is observed by hand: every run has 2 steps x 2 texts x 4 or 6 tokens, and 10 are kept."""
    runs, statistics = seen
    whole = []
    handle = reference.denoiser.transformer.transformer_blocks[0].attn1.to_v.register_forward_pre_hook(
        lambda module, inputs: whole[-1].append(inputs[0].flatten(0, 1))
    )
    for run in runs:
        whole.append([])
        text = reference.encode_text([run.spec.prompt], "", run.spec.guidance)
        for step, row in enumerate(reference.schedule(None, 2).table):
            latents = run.latents[step : step + 1]
            reference.step(latents, torch.zeros_like(latents), row, text, guidance=run.spec.guidance)
    handle.remove()
    tokens = [torch.cat(parts) for parts in whole]
    assert [len(part) for part in tokens] == [16, 24]
    wanted = torch.cat([part[[i * len(part) // 10 for i in range(10)]] for part in tokens])
    assert torch.equal(statistics.rows(QKV), wanted)


@pytest.mark.parametrize(("value", "words"), [(math.nan, "activations reach nan"), (math.inf, "activations reach (inf|nan)")])
def test_activations_that_are_not_finite_are_named(folder, seen, tmp_path, value, words):
    runs, _ = seen
    broken = SanaReference(folder)
    with torch.no_grad():
        broken.denoiser.transformer.transformer_blocks[1].scale_shift_table[0, 7] = value
    said = rf"transformer_blocks\.1\.attn1\.to_qkv: {words} in channel \d+ at step 1 of 2.*Mend the checkpoint"
    with pytest.raises(CheckpointError, match=said):
        observe(broken, runs, rows=10, store=Store(tmp_path), progress=quiet())


def test_activations_that_are_all_zero_are_named(folder, seen, tmp_path):
    runs, _ = seen
    broken = SanaReference(folder)
    with torch.no_grad():
        broken.denoiser.transformer.transformer_blocks[0].attn1.to_v.weight.zero_()
    statistics = observe(broken, runs, rows=10, store=Store(tmp_path), progress=quiet())
    with pytest.raises(
        CheckpointError, match=r"transformer_blocks\.0\.attn1\.to_out\.0: activations have a range of 0 in all 2 runs"
    ):
        statistics.channels("transformer_blocks.0.attn1.to_out.0")


@pytest.mark.slow
def test_calibrators_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 16, generator=generator)
    channels = rows.abs().amax(0)

    def to_int8(x, largest):
        return round_static(x, "int8", largest / 127)

    def largest(method, percentile=99.9):
        return largest_for_scale(method, channels, rows, to_int8, percentile=percentile)

    assert largest("absmax") == float(rows.abs().max())
    bin_width = float(rows.abs().max()) / 2048
    assert largest("percentile") == pytest.approx(float(rows.abs().flatten().quantile(0.999)), abs=2 * bin_width)
    errors = {}
    for number in range(41):
        amax = float(channels.amax()) * (0.2 + 0.02 * number)
        errors[amax] = float((to_int8(rows, amax) - rows).square().sum())
    assert largest("mse") == pytest.approx(min(errors, key=errors.__getitem__), rel=1e-5)
    rows[0, 0] = channels[0] = 40.0  # an outlier: (40 - a)^2 lost by cutting it, n (a / 127)^2 / 12 by rounding all the others
    assert largest("absmax") == 40
    assert largest("mse") == pytest.approx(40 / (1 + rows.numel() / (12 * 127**2)), abs=0.02 * 40)


@pytest.mark.parametrize(("installed", "words"), [(None, "not installed"), ("0.48.1", r"got 0\.48\.1, which was not tested")])
def test_modelopt_that_was_not_tested(monkeypatch, installed, words):
    def version(name):
        if installed is None:
            raise calibrators.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(calibrators, "version", version)
    with pytest.raises(SpecError, match=rf"nvidia-modelopt: {words}"):
        calibrators.check_version()


@given(st.floats(0.01, 1), st.integers(0, 1000))
def test_smoothing_is_the_papers_up_to_one_factor(exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.rand(8, generator=generator) + 0.01 for _ in range(2))
    ratio = smoothing(x, exponent, w) / (x**exponent / w ** (1 - exponent))
    assert torch.allclose(ratio, ratio[0].expand(8), rtol=1e-5)
    assert float(smoothing(x, exponent, w).log().mean()) == pytest.approx(0, abs=1e-5)
    assert smoothing(torch.tensor([0.0, 1.0]), exponent).isfinite().all()  # a channel that is never used


def test_low_rank_is_the_best_of_its_rank():
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(weight, 3)
    assert (up.shape, down.shape) == ((12, 3), (3, 20))
    rest = torch.linalg.svdvals(weight)[3:].square().sum()
    assert (weight - up @ down).square().sum() == pytest.approx(float(rest), rel=1e-4)


def outliers() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (48, 64) and tokens (256, 64), a few channels of which are much larger, as in transformers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 64, generator=generator)
    rows[:, ::16] *= 30
    return torch.randn(48, 64, generator=generator), rows


def error_of(overrides, name="nvfp4"):
    weight, rows = outliers()
    return plan_layer("layer", name, load_recipe(name, overrides), weight, rows.abs().amax(0), rows)


@pytest.mark.slow
def test_what_outliers_cost_and_what_helps():
    plain = error_of(["awq=null", "low_rank=0"]).error
    searched = error_of(["low_rank=0"])
    assert searched.error < 0.8 * plain
    assert searched.exponent > 0
    assert error_of(["low_rank=16"]).error < 0.8 * searched.error
    assert error_of(["awq=[0.0]", "low_rank=0"]).error == plain  # exponent 0 is no smoothing
    static = ["activations=static", "method=absmax"]
    assert error_of([*static, "smoothquant=0.5"], "int8").error < 0.5 * error_of([*static, "smoothquant=null"], "int8").error


@pytest.mark.slow
def test_the_search_takes_the_least_error_that_the_simulation_has():
    single = {a: error_of([f"awq=[{a}]", "low_rank=4"]).error for a in (0.0, 0.25, 0.5, 0.75, 1.0)}
    found = error_of(["low_rank=4"])
    assert found.error == min(single.values())
    assert found.exponent == min(single, key=single.__getitem__)


def test_bad_layers():
    weight, rows = outliers()
    recipe = load_recipe("nvfp4", ["low_rank=49"])
    with pytest.raises(SpecError, match=r"low_rank: got 49 for layer, whose weight is \(48, 64\)"):
        plan_layer("layer", "nvfp4", recipe, weight, rows.abs().amax(0), rows)
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(CheckpointError, match=r"layer\.weight: got a range of"):
            plan_layer("layer", "int8", load_recipe("int8"), torch.full((48, 64), value), rows.abs().amax(0), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4"])
def test_the_same_bits_twice_and_nothing_done_the_third_time(folder, reference, seen, store, tmp_path, name):
    overrides = [*SMALL, "activations=static", "keep=['*.1.attn2.to_q']", f"low_rank={4 if name == 'nvfp4' else 0}"]
    recipe, checkpoint = load_recipe(name, overrides), checkpoints.load(folder)
    first = calibrate(checkpoint, recipe, store=store, progress=quiet())
    second = calibrate(checkpoint, recipe, store=Store(tmp_path / "other"), progress=quiet())
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    third = quiet()
    plan = make_plan(checkpoint, recipe, store=store, progress=third)
    assert third.stages == []

    assert len(plan.layers) == 11
    assert all(layer.format == name and layer.input_scale > 0 for layer in plan.layers.values())
    assert plan.notes["checkpoint"] == checkpoint.digest
    report = CalibrationReport.model_validate_json((first / "calibration.json").read_bytes())
    assert [layer.format for layer in report.layers].count("none") == 1
    assert all(len(layer.ranges) == 2 and max(layer.ranges) == layer.largest for layer in report.layers)
    text = (first / "calibration.html").read_text(encoding="utf-8")
    assert text.count("<rect") == 24
    assert all(layer.group in text for layer in report.layers)

    x, w = torch.randn(3, 64), reference.denoiser.transformer.transformer_blocks[0].attn1.to_q.weight
    with torch.no_grad(), QuantizedLinears(reference.denoiser.transformer, load_plan(first / "plan.safetensors")):
        assert 0 < (F.linear(x, w) - x @ w.T).square().mean() < 0.05 * (x @ w.T).square().mean()


@pytest.mark.slow
def test_a_method_or_prompt_that_changes_makes_another_plan(folder, store):
    checkpoint = checkpoints.load(folder)
    changes = [[], ["method=mse"], ["calibration.seed=7"], ["calibration.rows=11"]]
    folders = {
        calibrate(checkpoint, load_recipe("fp8", [*SMALL, "activations=static", *change]), store=store, progress=quiet())
        for change in changes
    }
    assert len(folders) == len(changes)


def test_a_wrong_recipe_is_answered_before_anything_is_drawn(folder, tmp_path):
    checkpoint, nothing = checkpoints.load(folder), Store(tmp_path)
    with pytest.raises(ConfigError, match="nearest is"):
        calibrate(checkpoint, load_recipe("int8", ["keep=[transformer_blocks.9.attn2.to_q]"]), store=nothing)
    with pytest.raises(SpecError, match="got 3 calibration prompts; expected 65"):
        calibrate(checkpoint, load_recipe("int8", ["calibration.num_prompts=65"]), store=nothing)
    progress = quiet()
    with pytest.raises(SpecError, match=rf"low_rank: got 65 for {QKV}, whose weight is \(192, 64\)"):
        calibrate(checkpoint, load_recipe("nvfp4", [*SMALL, "low_rank=65"]), store=nothing, progress=progress)
    assert progress.stages == []


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    folder = write(tmp_path)
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    name = "transformer_blocks.1.ff.conv_point.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(CheckpointError, match=rf"'{name}' is stored as F8_E4M3; .* quantized"):
        checkpoints.load(folder)


def test_a_checkpoint_that_modelopt_quantized_in_simulation_is_not_quantized_again(tmp_path):
    """Its weights have 16 or 32 bits still, and ranges beside them."""
    folder = write(tmp_path)
    (path,) = (folder / "transformer").glob("*.safetensors")
    name = "transformer_blocks.1.ff.conv_point.input_quantizer._amax"
    save_file({**load_file(path), name: torch.tensor(3.0)}, path)
    with pytest.raises(CheckpointError, match=rf"got '{name}', .* these weights are quantized"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("names", "value", "keys", "words"),
    [
        (("to_q",), math.nan, [], r"attn1\.to_q\.weight: got NaN or infinity in a weight"),
        (("to_q",), math.inf, [f"keep=['{QKV}']"], r"attn1\.to_q\.weight: got NaN or infinity in a weight"),
        (("to_q", "to_k", "to_v"), 0.0, [], r"attn1\.to_qkv\.weight: got a range of 0"),
    ],
)
def test_a_weight_without_a_range_is_named_before_anything_is_drawn(tmp_path, names, value, keys, words):
    """And not the layer behind it, whose activations are as bad."""
    folder, nothing = write(tmp_path / "bad"), Store(tmp_path / "store")
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    for name in names:
        weight = tensors[f"transformer_blocks.0.attn1.{name}.weight"]
        (weight if value == 0 else weight[3, 5]).fill_(value)
    save_file(tensors, path)
    progress = quiet()
    with pytest.raises(CheckpointError, match=rf"^transformer_blocks\.0\.{words}"):
        calibrate(checkpoints.load(folder), load_recipe("int8", [*SMALL, *keys]), store=nothing, progress=progress)
    assert progress.stages == []


def test_interrupt_ends_quietly(folder, store, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.quantization_plan.draw_all", interrupted)
    out = tmp_path / "calibration"
    words = ["--model", str(folder), "--recipe", "int8", "--out", str(out), "--cache", str(tmp_path / "store"), *SMALL]
    assert calibrate_command(words) == 130
    assert "interrupted. Finished runs are kept" in capsys.readouterr().err
    assert not out.exists()


def test_notes_hold_the_recipe(folder, store):
    recipe = load_recipe("int8", [*SMALL, "smoothquant=0.5"])
    plan = make_plan(checkpoints.load(folder), recipe, store=store, progress=quiet())
    assert json.loads(plan.notes["recipe"])["smoothquant"] == 0.5


@pytest.mark.slow
def test_the_command_writes_a_folder_and_replaces_its_own(folder, store, tmp_path, capsys):
    out = tmp_path / "calibration"
    words = ["--model", str(folder), "--recipe", "int8", "--out", str(out), "--cache", str(store.root), *SMALL]
    for _ in range(2):
        assert calibrate_command(words) == 0
        assert sorted(file.name for file in out.iterdir()) == ["calibration.html", "calibration.json", "plan.safetensors"]
        assert all(layer.input_scale for layer in load_plan(out / "plan.safetensors").layers.values())  # as engines need it
    (tmp_path / "other").mkdir()
    assert calibrate_command([*words, "--out", str(tmp_path / "other")]) == 2
    assert "is no calibration" in capsys.readouterr().err
    assert not list(tmp_path.glob(".new-*"))
