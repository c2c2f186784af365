"""Recipes of the published variants: made from shapes and a table of sensitivities, what ships, and which a build follows."""

from pathlib import Path

import pytest
from tiny_build import quiet, request, tiny

from engines.errors import ConfigError
from engines.store import Store
from export import variant_recipes
from export.choose_recipe import group_bytes, sizes_of
from export.quantization_request import quantization_of
from export.quantize import quantize
from export.recipe import load_recipe
from export.settings import load
from export.variant_recipes import ALLOWANCE, BETTER, chosen, expected_errors, read_table, text_of
from runtime.config import CONFIGS
from sana_ref.build import empty
from sana_ref.checkpoint import load as load_checkpoint
from sana_ref.transformer import SanaTransformer2DModel
from sana_ref.variants import VARIANTS

TABLE = Path(__file__).parents[2] / variant_recipes.TABLE
LIMITS = {"int8": 0.55, "fp8": 0.55, "nvfp4": 0.33}  # of fp16's bytes
SHIPPED = [(variant, name) for variant in VARIANTS for name in BETTER]
IDS = ["-".join(pair) for pair in SHIPPED]


def shapes(variant: str) -> SanaTransformer2DModel:
    return empty(lambda: SanaTransformer2DModel(VARIANTS[variant].transformer))


def test_errors_of_a_deeper_model_follow_the_depth_and_add_up_to_the_same():
    """Of two blocks with errors 1 and 3 to four: between the middles linear, at the ends as they are."""
    table = {f"transformer_blocks.{block}.ff.conv_point": {"int8": error} for block, error in enumerate((1.0, 3.0))}
    found = expected_errors(table, [f"transformer_blocks.{block}.ff.conv_point" for block in range(4)])  # type: ignore[arg-type]
    assert [each["int8"] for each in found.values()] == [0.5, 0.75, 1.25, 1.5]
    assert sum(each["int8"] for each in found.values()) == 4.0
    same = expected_errors(table, list(table))  # type: ignore[arg-type]
    assert [each["int8"] for each in same.values()] == [1.0, 3.0]


@pytest.mark.parametrize("name", BETTER)
def test_what_gains_most_is_chosen(name):
    """One kind of group, in one block, has nearly all of the error: it gets more bits, and little else does."""
    transformer = shapes("sana_600m_1024px")
    sizes, sides = sizes_of(transformer)
    table = {group: {"int8": 1e-9, "fp8": 1e-9, "nvfp4": 2e-9} for group in sides}
    worst = "transformer_blocks.3.attn2.to_out.0"
    assert worst in sides
    table[worst] = {"int8": 1.0, "fp8": 0.1, "nvfp4": 1.0}
    recipe = load_recipe(name)
    allocation, _ = chosen(transformer, recipe, table)  # type: ignore[arg-type]
    assert allocation[worst].format == BETTER[name]
    smooth = recipe.smoothquant is not None or recipe.awq is not None
    plain = sum(group_bytes(name, *side, rank=recipe.low_rank, smooth=smooth) for side in sides.values())
    assert sum(choice.num_bytes for choice in allocation.values()) <= plain + ALLOWANCE * sizes.half


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "name"), SHIPPED, ids=IDS)
def test_what_ships_is_what_the_rule_says(variant, name):
    """To the byte, and the rule is of existing groups: formats_of refuses others."""
    shipped = (CONFIGS / "quantization" / variant / f"{name}.yaml").read_text(encoding="utf-8")
    assert shipped == text_of(variant, name, read_table(TABLE))
    assert "Not measured on the published weights" in shipped
    recipe = load_recipe(f"{variant}/{name}")
    sizes, sides = sizes_of(shapes(variant))
    formats = recipe.formats_of(list(sides))
    assert set(formats.values()) == {name, BETTER[name]}
    smooth = recipe.smoothquant is not None or recipe.awq is not None
    size = sizes.fixed + sum(
        group_bytes(kind, *sides[group], rank=recipe.low_rank, smooth=smooth) for group, kind in formats.items()
    )
    assert size / sizes.half <= LIMITS[name]
    same = recipe.model_copy(update={"keep": (), "formats": ()})
    assert same == load_recipe(name)  # all else is the format's recipe


def test_a_recipe_for_a_variant_that_has_none():
    with pytest.raises(ConfigError, match=r"got 'sana_1600m_1024px/int9'; .*sana_1600m_1024px/int8"):
        load_recipe("sana_1600m_1024px/int9")
    with pytest.raises(ConfigError, match=r"got '\.\./quantization/int8'"):
        load_recipe("../quantization/int8")


def of(**flags: object):
    _, asked = quantization_of(load("build", flags={"device": "cpu", **flags}))
    assert asked is not None
    return asked


@pytest.mark.slow
def test_a_build_follows_the_recipe_of_its_variant():
    """With the keys that were asked for; not for another model, under a budget, or by a file."""
    asked = of(precision="nvfp4", recipe_keys=["low_rank=8"])
    found = asked.of_variant("sana_600m_1024px")
    assert (found.name, found.recipe.low_rank) == ("sana_600m_1024px/nvfp4", 8)
    assert found.recipe.formats == load_recipe("sana_600m_1024px/nvfp4").formats != ()
    assert asked.of_variant(None) is asked
    budget = of(precision="nvfp4", budget="size<=0.4")
    assert budget.of_variant("sana_600m_1024px") is budget


def test_a_build_by_a_file_follows_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - quantization/int8@_global_\n  - _self_\nmethod: mse\n", encoding="utf-8")
    asked = of(precision=str(path))
    assert asked.of_variant("sana_600m_1024px") is asked


@pytest.mark.slow
def test_writing(tmp_path):
    assert variant_recipes.main(["write", "--table", str(TABLE), "--out", str(tmp_path)]) == 0
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.yaml")} == {f"{v}/{n}.yaml" for v, n in SHIPPED}


def test_a_table_that_is_not_there(tmp_path, capsys):
    assert variant_recipes.main(["write", "--table", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 1
    assert "none.json" in capsys.readouterr().err


def test_what_calibrates_asks_which_variant_it_is(tmp_path, monkeypatch):
    """The tiny model has two blocks: the recipe of a variant, which names others, is refused, and so was followed."""
    checkpoint = load_checkpoint(tiny())
    monkeypatch.setattr(
        "export.quantize.variant_of", lambda config: "sana_600m_1024px" if config is checkpoint.transformer_config else None
    )
    asked = of(precision="nvfp4")
    with pytest.raises(ConfigError, match=r"formats: got 'transformer_blocks\.\d+\..*', which matches no group of layers"):
        quantize(request(tmp_path / "out"), asked, checkpoint, Store(tmp_path), quiet())
