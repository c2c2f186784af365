"""What a quantized denoiser weighs: the parts add up, and shapes alone say what the checkpoint's tensors do."""

import math
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import quantized_sizes
from export.recipe import load_recipe
from sana_ref.build import empty
from sana_ref.text_projection import is_text_parameter
from sana_ref.transformer import SanaTransformer2DModel
from sana_ref.variants import VARIANTS

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"


def test_the_rest_and_the_groups_are_all_of_the_denoiser():
    transformer = empty(lambda: SanaTransformer2DModel(VARIANTS["sana_600m_1024px"].transformer))
    weight = quantized_sizes.weigh(transformer, load_recipe("nvfp4"))
    assert sum(quantized_sizes.rest(transformer).values()) == weight.fixed
    own = sum(p.numel() for name, p in transformer.named_parameters() if not is_text_parameter(name))
    assert weight.half == 2 * own
    kept = quantized_sizes.weigh(transformer, load_recipe("nvfp4", ["keep=['*']"]))
    assert (kept.ratio, kept.branches) == (1.0, 0)


def test_a_branch_costs_its_rank():
    transformer = empty(lambda: SanaTransformer2DModel(VARIANTS["sana_1600m_1024px"].transformer))
    thin, thick = (quantized_sizes.weigh(transformer, load_recipe("nvfp4", [f"low_rank={rank}"])) for rank in (0, 16))
    assert (thin.branches, thin.numbers) == (0, thick.numbers)
    dim, inner = 2240, 5600
    sides = 3 * dim + dim, 3 * (dim + dim), dim + 2 * inner, inner + dim  # qkv; three squares; the feed-forward's two
    assert thick.branches == 20 * 2 * 16 * sum(sides)


def test_the_command_and_its_figure(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(quantized_sizes, "record", lambda *args, **more: seen.append((args, more)) or {})
    assert quantized_sizes.main(["--model", str(MODEL), "--recipes", "int8", "--key", "smoothquant=null", "--record"]) == 0
    ((figure, ratio, unit), more), *others = seen
    assert (figure, unit, others) == ("quant_int8_tiny_size_ratio", "ratio", [])
    assert more["note"].startswith("sana-tiny, denoiser's weights reckoned from shapes, recipe int8 smoothquant=null: ")
    with safe_open(MODEL / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    half = sum(2 * _numel(shape) for name, shape in shapes.items() if not is_text_parameter(name))
    assert f"of fp16's {half} bytes" in capsys.readouterr().out
    assert 0.5 < ratio < 0.6


def test_a_variant_is_weighed_by_the_recipe_that_a_build_follows(capsys):
    assert quantized_sizes.main(["--variant", "sana_600m_1024px", "--recipes", "nvfp4"]) == 0
    assert "sana_600m_1024px sana_600m_1024px/nvfp4: 0.32" in capsys.readouterr().out


def test_a_recipe_that_does_not_exist(capsys):
    assert quantized_sizes.main(["--model", str(MODEL), "--recipes", "int9"]) == 1
    assert "int9" in capsys.readouterr().err


def test_a_model_must_be_named():
    with pytest.raises(SystemExit):
        quantized_sizes.main([])


def _numel(shape: list[int]) -> int:
    return math.prod(shape)
