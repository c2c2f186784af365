"""Recipes of a quantization: what ships, what is refused, and which group gets which format."""

import pytest

from engines.errors import ConfigError
from export.recipe import load_recipe
from runtime.config import names_in_group

GROUPS = [f"transformer_blocks.{block}.{kind}" for block in range(12) for kind in ("attn1.to_qkv", "attn2.to_q", "ff.conv_point")]


def test_the_recipes_that_ship():
    assert names_in_group("quantization") == ["fp8", "int8", "nvfp4"]
    for name in names_in_group("quantization"):
        recipe = load_recipe(name)
        assert set(recipe.formats_of(GROUPS).values()) == {name}
        assert recipe.calibration.num_prompts <= 64  # as many as ship


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("int9", [], "did you mean 'int8'"),
        ("no/such.yaml", [], "no such recipe"),
        ("int8", ["methd=mse"], "did you mean 'method'"),
        ("int8", ["+calibration.step=3"], r"calibration\.step: unknown key; did you mean 'steps'"),
        ("int8", ["method=msee"], "did you mean 'mse'"),
        ("int8", ["format=int4"], "Valid: none, int8, fp8, nvfp4"),
        ("int8", ["smoothquant=1.5"], "smoothquant: got 1.5"),
        ("int8", ["smoothquant=0.5", "awq=[0.5]"], "both smoothquant and awq"),
        ("nvfp4", ["awq=[]"], "awq: got"),
        ("int8", ["calibration.num_prompts=0"], "num_prompts: got 0"),
    ],
)
def test_bad_recipes(name, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe(name, overrides)


def test_patterns(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - quantization/nvfp4@_global_\n  - _self_\nkeep: ['*.attn2.to_q']\n", encoding="utf-8")
    rules = "formats=[{groups:transformer_blocks.1*,format:fp8},{groups:transformer_blocks.11.attn1.*,format:none}]"
    formats = load_recipe(path, [rules]).formats_of(GROUPS)
    assert formats["transformer_blocks.0.attn1.to_qkv"] == "nvfp4"
    assert formats["transformer_blocks.10.attn1.to_qkv"] == "fp8"
    assert formats["transformer_blocks.11.attn1.to_qkv"] == "none"  # the last rule that matches holds
    assert formats["transformer_blocks.11.attn2.to_q"] == "none"  # and keep holds over all rules


@pytest.mark.parametrize(
    "key", ["keep=[transformer_blocks.3.attn2.to_k]", "formats=[{groups:transformer_blocks.3.attn2.to_k,format:fp8}]"]
)
def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_group(key):
    with pytest.raises(
        ConfigError, match=r"got 'transformer_blocks.3.attn2.to_k', .* nearest is 'transformer_blocks.3.attn2.to_q'"
    ):
        load_recipe("int8", [key]).formats_of(GROUPS)
