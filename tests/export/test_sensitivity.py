"""The sensitivity pass: each group alone on the whole run, kept one by one; and from a model to a recipe that is read back."""

from pathlib import Path

import pytest
import torch
from tiny_build import quiet
from tiny_checkpoint import write_checkpoint

from engines.store import Store
from export import sensitivity
from export.calibration_data import Run, draw, draw_all, plan_runs
from export.choose_recipe import combined, group_bytes, main, sizes_of
from export.quantization_plan import make_plan
from export.recipe import load_recipe
from export.sensitivity import latent_error, measure, only
from sana_ref.quantization import QuantizationPlan
from sana_ref.quantized import QuantizedLinears

SMALL = ["calibration.num_prompts=2", "calibration.steps=2", "calibration.sizes=[[64,64]]", "calibration.rows=10", "low_rank=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    (path / "calibration_prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plan(reference, store) -> QuantizationPlan:
    return make_plan(reference.checkpoint, load_recipe("nvfp4", SMALL), store=store, progress=quiet())


@pytest.fixture(scope="module")
def runs(reference, store) -> list[Run]:
    return draw_all(reference, plan_runs(reference.checkpoint, load_recipe("nvfp4", SMALL).calibration), store, quiet())


@pytest.mark.slow
def test_the_error_is_of_the_final_latents_of_the_whole_run(reference, plan, runs):
    errors = []
    for run in runs:
        with QuantizedLinears(reference.denoiser.transformer, plan):
            got = draw(reference, run.spec)
        assert torch.equal(got[0], run.latents[0])  # from the same noise
        errors.append(float((got[-1] - run.latents[-1]).double().square().sum() / run.latents[-1].double().square().sum()))
    assert latent_error(reference, plan, runs) == pytest.approx(sum(errors) / 2, rel=1e-6)
    assert latent_error(reference, QuantizationPlan(layers={}), runs) == 0


@pytest.mark.slow
def test_a_killed_pass_goes_on_and_each_group_is_measured_alone(reference, plan, runs, tmp_path, monkeypatch):
    real, seen = sensitivity.latent_error, []

    def counted(reference, alone, runs):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(list(alone.layers))
        return real(reference, alone, runs)

    monkeypatch.setattr(sensitivity, "latent_error", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(reference, {"nvfp4": plan}, runs, store=Store(tmp_path), progress=quiet())
    assert len(seen) == 5
    seen[:] = []
    monkeypatch.setattr(sensitivity, "latent_error", lambda *args: seen.append(list(args[1].layers)) or real(*args))
    table = measure(reference, {"nvfp4": plan}, runs, store=Store(tmp_path), progress=quiet())
    assert seen == [[group] for group in list(plan.layers)[5:]]
    assert {group: list(row) for group, row in table.items()} == {group: ["nvfp4"] for group in plan.layers}
    assert all(row["nvfp4"] > 0 for row in table.values())
    one = list(plan.layers)[3]
    assert table[one]["nvfp4"] == real(reference, only(plan, one), runs)


@pytest.mark.slow
def test_the_plan_of_a_chosen_recipe_is_the_formats_plans_put_together(reference, plan, store):
    fp8 = make_plan(reference.checkpoint, load_recipe("nvfp4", [*SMALL, "format=fp8"]), store=store, progress=quiet())
    rules = "formats=[{groups:'*.ff.*',format:fp8},{groups:'*.1.attn2.*',format:none}]"
    mixed = make_plan(reference.checkpoint, load_recipe("nvfp4", [*SMALL, rules]), store=store, progress=quiet())
    formats = load_recipe("nvfp4", [*SMALL, rules]).formats_of(list(plan.layers))
    put_together = combined({"nvfp4": plan, "fp8": fp8}, formats)
    assert put_together.layers == mixed.layers
    assert put_together.tensors.keys() == mixed.tensors.keys()
    assert all(torch.equal(put_together.tensors[name], tensor) for name, tensor in mixed.tensors.items())


def test_sizes_are_of_the_denoiser_without_the_texts_projection(reference):
    sizes, shapes = sizes_of(reference.denoiser.transformer)
    assert shapes["transformer_blocks.0.attn1.to_qkv"] == (192, 64)
    assert len(shapes) == 12
    own = [p for name, p in reference.denoiser.transformer.named_parameters() if "caption" not in name]
    own_bytes = 2 * sum(p.numel() for p in own)
    text = 2 * sum(
        parameter.numel()
        for block in reference.denoiser.transformer.transformer_blocks
        for module in (block.attn2.to_k, block.attn2.to_v)
        for parameter in module.parameters()
    )
    assert sizes.half == own_bytes - text
    assert sizes.fixed + sum(group_bytes("none", *shape) for shape in shapes.values()) == sizes.half


@pytest.mark.slow
def test_from_a_model_to_a_recipe(folder, store, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    words = ["--model", str(folder), "--recipe", "nvfp4", "--budget", "size<=0.6", "--out", str(out), "--cache", str(store.root)]
    assert main([*words, *SMALL]) == 0
    recipe = load_recipe(out)
    assert len(recipe.formats) == 12
    assert {rule.format for rule in recipe.formats} <= {"none", "fp8", "nvfp4"}
    assert "Measured: error " in out.read_text(encoding="utf-8").splitlines()[0]
    capsys.readouterr()
    for change, said in (
        (["--budget", "size<=0.01"], "the smallest that the formats allow is size"),
        (["--budget", "lpips>=0.1"], "expected lpips<=number"),
        (["--formats", "fp9"], "did you mean 'fp8'"),
    ):
        assert main([*words, *SMALL, *change]) == 2
        assert said in capsys.readouterr().err


def test_interrupt_ends_quietly(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.quantization_plan.draw_all", interrupted)
    out = tmp_path / "mine.yaml"
    words = ["--model", str(folder), "--recipe", "nvfp4", "--budget", "size<=0.6", "--out", str(out), "--cache", str(tmp_path)]
    assert main([*words, *SMALL]) == 130
    assert "interrupted. Finished runs are kept" in capsys.readouterr().err
    assert not out.exists()
