"""`--budget`: what is chosen holds it as measured, what cannot be met names what stands in the way, and nothing is done twice."""

import pytest
from tiny_build import cache, quiet, request, said, shared, tiny
from tiny_recipes import SHORT, command, prompts, recipe

from engines.errors import SpecError
from engines.spec import Precision
from engines.store import Store
from export import budgeted
from export.budget import parse_budget
from export.budgeted import choose_for, whole_cost
from export.calibration_data import draw_all, plan_runs
from export.progress import Progress
from export.quantization_plan import make_plan
from export.quantization_request import QuantizationRequest
from export.quantize import quantize
from export.recipe import load_recipe
from sana_ref import checkpoint as checkpoints
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import Format, groups_of

OFFERED: tuple[Format, ...] = ("nvfp4", "fp8")


def chosen_for(budget: str, *keys: str, progress: Progress | None = None):
    checkpoint = checkpoints.load(tiny())
    asked, store = parse_budget(budget), Store(cache())
    return choose_for(checkpoint, recipe("nvfp4", *keys), OFFERED, asked, store=store, progress=progress or quiet(), device="cpu")


@pytest.fixture(scope="module")
def smallest() -> dict[str, float]:
    """What all of it in NVFP4 costs."""
    checkpoint, store = checkpoints.load(tiny()), Store(cache())
    plan = make_plan(checkpoint, recipe("nvfp4"), store=store, progress=quiet())
    reference = SanaReference(checkpoint)
    runs = draw_all(reference, plan_runs(checkpoint, recipe("nvfp4").calibration), store, quiet())
    return whole_cost(reference, plan, runs, pictures=True, store=store)


@pytest.mark.slow
def test_pictures_within_a_budget(smallest):
    limit = smallest["lpips"] / 2
    assert limit > 0
    chosen = chosen_for(f"lpips<={limit}")
    assert chosen.measured["lpips"] <= limit
    assert chosen.measured["size"] < 1
    assert set(chosen.formats.values()) - {"none"}
    assert {group: layer.format for group, layer in chosen.plan.layers.items()} == {
        group: kind for group, kind in chosen.formats.items() if kind != "none"
    }
    generous = chosen_for("lpips<=0.99, psnr_db>=1")
    assert set(generous.formats.values()) == {"nvfp4"}
    assert generous.measured == pytest.approx({**smallest, "size": generous.measured["size"]})


@pytest.mark.slow
def test_the_recipe_that_is_written_makes_the_same_plan(smallest, tmp_path):
    chosen = chosen_for(f"error<={smallest['error'] / 2}")
    path = tmp_path / "mine.yaml"
    path.write_text(chosen.text(recipe("nvfp4")), encoding="utf-8")
    again = load_recipe(path)
    assert again.formats_of(list(chosen.formats)) == dict(chosen.formats)
    assert make_plan(checkpoints.load(tiny()), again, store=Store(cache()), progress=quiet()).layers == chosen.plan.layers


@pytest.mark.slow
def test_what_is_kept_stays_kept_and_rules_are_not_read():
    progress = quiet()
    rule = "formats=[{groups:'*.ff.*',format:fp8}]"
    chosen = chosen_for("lpips<=0.99", "keep=['*.attn2.*']", rule, progress=progress)
    assert {group for group, kind in chosen.formats.items() if kind == "none"} == {
        "transformer_blocks.0.attn2.to_q",
        "transformer_blocks.0.attn2.to_out.0",
    }
    assert set(chosen.formats.values()) == {"none", "nvfp4"}
    assert "the recipe's own formats are not read" in said(progress)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("error<=1e-12", r"is met only where nothing is quantised\. In the way, by their error in nvfp4: transformer_blocks\.0\."),
        ("lpips<=1e-9, size<=0.9", r"cannot be met: lpips: got .*; expected <= 1e-09\. In the way, .*: transformer_blocks\.0\."),
        ("size<=0.01", "the smallest that the formats allow is size"),
    ],
)
def test_what_cannot_be_met_names_the_layers_in_the_way(budget, words):
    with pytest.raises(SpecError, match=words):
        chosen_for(budget)


def test_a_size_that_no_format_has_is_answered_before_anything_is_drawn():
    progress = quiet()
    with pytest.raises(
        SpecError, match=r"the smallest that the formats allow is size .* The largest groups: transformer_blocks\.0\."
    ):
        chosen_for("lpips<=0.99, size<=0.01", progress=progress)
    assert progress.stages == []


@pytest.mark.slow
def test_nothing_is_measured_twice(monkeypatch):
    first = chosen_for("lpips<=0.99")
    monkeypatch.setattr(budgeted, "draw", lambda *_: pytest.fail("drawn again"))
    progress = quiet()
    assert chosen_for("lpips<=0.99", progress=progress).measured == first.measured
    assert "sensitivity                             unchanged, nothing done" in said(progress)


@pytest.mark.slow
def test_the_report_says_what_it_cost():
    asked = QuantizationRequest(
        recipe=recipe("nvfp4"), name="nvfp4", budget=parse_budget("lpips<=0.99"), offered=OFFERED, recipe_out=shared() / "out.yaml"
    )
    wanted = request(shared() / "never", precision=Precision.NVFP4, quantization=asked)
    made = quantize(wanted, asked, checkpoints.load(tiny()), Store(cache()), quiet())
    assert made.precision is Precision.NVFP4
    assert "chosen for the budget lpips<=0.99; simulated: error " in made.report.lines()[1]
    assert made.recipe is not None
    assert str(shared()) not in made.recipe
    assert str(prompts()) in (shared() / "out.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_build_under_a_budget(tmp_path, capsys):
    keys = [word for key in SHORT for word in ("--recipe-key", key)]
    words = ["--precision", "nvfp4", *keys, "--calibration-prompts", str(prompts())]
    assert command(tmp_path / "b", *words, "--budget", "lpips<=0.99") == 0
    heard = capsys.readouterr().err
    assert f"of {len(groups_of(checkpoints.load(tiny()).sources['transformer'].shapes))} groups of layers 6 nvfp4" in heard
    assert "chosen for the budget lpips<=0.99; simulated:" in heard
    assert command(tmp_path / "b", *words, "--budget", "error<=1e-12") == 2
    assert "In the way" in capsys.readouterr().err
