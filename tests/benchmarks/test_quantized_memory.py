"""The pipeline's memory: what is added up, what two small networks say of a large one, and the figure."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_build import RANGES, cache, tiny

from benchmarks import quantized_memory
from benchmarks.quantized_memory import Memory, extrapolated, total, transfers
from benchmarks.quantized_sizes import weigh
from engines.spec import COMPONENTS, Precision, component_precision
from export.components import components, profiles, with_weights
from export.recipe import load_recipe
from sana_ref.checkpoint import load
from sana_ref.quantization import groups_of
from sana_ref.quantized import quantize_layer


def everything(precision: Precision = Precision.FP16):
    return components(load(tiny()), component_precision(precision))


def test_blocks_are_added_to_what_is_there_once():
    small, large = Memory(weights=1000, activations=50), Memory(weights=1300, activations=50)
    assert extrapolated(small, large, 1) == small
    assert extrapolated(small, large, 2) == large
    assert extrapolated(small, large, 20) == Memory(weights=1000 + 19 * 300, activations=50)
    shrinking = replace(large, activations=40)
    assert extrapolated(small, shrinking, 20).activations == 50  # a planner's luck is not multiplied


def test_the_arena_is_the_largest_need():
    parts = {name: Memory(weights=10**i, activations=7 * i) for i, name in enumerate(COMPONENTS)}
    assert total(parts, 5) == 1111 + 21 + 5


@pytest.mark.parametrize("blocks", [1, 3])
def test_inputs_and_outputs(blocks):
    """By hand: batch 4, two texts of 24 tokens with 48 channels, 60 read; 4 heads of 16; 8 x 8 cells."""
    parts = everything()
    shapes = {name: profiles(part, RANGES, instructed_tokens=60, embedded_guidance=False) for name, part in parts.items()}
    tokens, embeds, mask = 2 * 4 * 60 * 8, 2 * 4 * 24 * 48 * 4, 2 * 4 * 24 * 4
    keys_values = 2 * blocks * 2 * 4 * 24 * 4 * 16 * 2  # fp16
    latents, others = 4 * 4 * 32 * 8 * 8 * 4, (8 + 2) * 4  # in, previous, next, prediction; coefficients and weights
    images = 4 * 3 * 256 * 256 * (4 + 1)  # and their levels
    assert transfers(parts, shapes, blocks) == tokens + embeds + mask + keys_values + latents + others + images


def test_a_table_on_the_host_is_inputs_alone():
    """Rows of 48 channels in bf16 for each of 60 tokens of 4 texts, in place of their ids."""
    parts = everything()
    host = with_weights(parts, {"text_encoder_table": "host"})
    found = [
        transfers(each, {name: profiles(p, RANGES, instructed_tokens=60, embedded_guidance=False) for name, p in each.items()}, 1)
        for each in (parts, host)
    ]
    assert found[1] - found[0] == 4 * 60 * (48 * 2 - 8)


def test_a_text_encoder_in_w8a8_is_counted_as_one():
    part = everything()["text_encoder"]
    plan = quantized_memory._plan(part, load_recipe("fp8", ["text_encoder=w8a8", "text_encoder_keep=[layers.0.mlp.down_proj]"]))
    assert {layer.format for layer in plan.layers.values()} == {"int8", "none"}
    assert plan.layers["layers.0.mlp.down_proj"].format == "none"
    assert plan.tensors.keys() == {f"{group}.smooth" for group, layer in plan.layers.items() if layer.format == "int8"}
    assert replace(part, weights="int8", plan=plan).packed.keys() == {
        "encoder.embed_tokens.weight",
        "encoder.layers.0.mlp.down_proj.weight",
    }


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_the_plan_weighs_what_a_calibration_s_does(name):
    recipe = load_recipe(name)
    part = everything(Precision(name))["denoiser"]
    plan = quantized_memory._plan(part, recipe)
    parameters = dict(part.module.named_parameters())
    stored = 0
    for group, names in groups_of(parameters).items():
        import torch

        weight = torch.randn(sum(parameters[each].shape[0] for each in names), parameters[names[0]].shape[1])
        layer = quantize_layer(plan, group, weight)
        tensors = [layer.weight.numbers, layer.weight.scale, layer.weight.block_scale]
        stored += sum(each.numel() * each.element_size() for each in tensors if each is not None)
    reckoned = weigh(part.module.transformer, recipe).numbers
    smooth = 0 if recipe.awq is None else sum(2 * parameters[names[0]].shape[1] for names in groups_of(parameters).values())
    assert stored == pytest.approx(reckoned - smooth, rel=0.02)


def fake_build(checkpoint, recipe, store, target, blocks):
    weights = 100 if recipe is None else 40
    parts = {name: Memory(weights=weights, activations=30) for name in COMPONENTS}
    return quantized_memory._Built(parts=parts, buffers=20)


def test_the_command_and_its_figure(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(quantized_memory, "record", lambda *args, **more: seen.append((args, more)) or {})
    monkeypatch.setattr(quantized_memory, "_build", fake_build)
    words = ["--model", str(tiny()), "--recipes", "nvfp4", "--key", "text_encoder=int8", "--work", str(tmp_path), "--record"]
    assert quantized_memory.main(words) == 0
    ((figure, ratio, unit), more), *others = seen
    assert (figure, ratio, unit, others) == (f"quant_nvfp4_{Path(tiny()).name}_memory_ratio", (160 + 50) / (400 + 50), "ratio", [])
    assert "Recipe nvfp4 text_encoder=int8: text encoder 0, " in more["note"]
    out = capsys.readouterr().out
    assert "fp16: 1.0000 of fp16's" in out


def test_a_recipe_that_does_not_exist(capsys, tmp_path):
    assert quantized_memory.main(["--model", str(tiny()), "--recipes", "int9", "--work", str(tmp_path)]) == 1
    assert "int9" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_s_engines(capsys, tmp_path):
    (tmp_path / "cache").symlink_to(cache())  # fp16's exports are those of other tests
    assert quantized_memory.main(["--model", str(tiny()), "--recipes", "int8", "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
