"""Recipes beside each other: products that are replaced, what is said of them, and the page."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks import compare_recipes, peer_recipes
from benchmarks.compare_recipes import METRICS, Result, seeds_of, sentence
from benchmarks.peer_recipes import Candidate, OurLinears, PeerLinears, Unavailable
from benchmarks.recipes_page import page
from export.metrics.pictures import estimate
from sana_ref.quantization import groups_of
from sana_ref.quantized import QuantizedLinears, uniform_plan
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig

CONFIG = SanaTransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=1,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=48,
)


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    torch.manual_seed(0)
    return SanaTransformer2DModel(CONFIG).eval()


def velocity(transformer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 32, 4, 4, generator=generator), torch.randn(1, 5, 48, generator=generator)
    with torch.inference_mode():
        return transformer(latents, text, torch.tensor([500.0]))


def test_linears_of_a_peer_that_quantizes_nothing_are_the_reference(transformer):
    exact = velocity(transformer)
    peer = PeerLinears(transformer)
    assert len(peer.linears) == len(groups_of(n for n, _ in transformer.named_parameters())) + 2  # q, k and v each on its own
    with peer:
        same = velocity(transformer)
    assert (same - exact).abs().max() <= 1e-5 * exact.abs().max()
    for linear in peer.linears.values():
        linear.weight.data.zero_()
    with peer:
        assert (velocity(transformer) - exact).abs().max() > 1e-3 * exact.abs().max()  # each product is the peer's


def test_kept_weights_change_no_bit(transformer):
    plan = uniform_plan("int8", groups_of(name for name, _ in transformer.named_parameters()))
    with QuantizedLinears(transformer, plan):
        expected = velocity(transformer)
    with OurLinears(transformer, plan):
        assert torch.equal(velocity(transformer), expected)


@dataclass
class Channels:
    largest: dict[str, torch.Tensor]

    def channels(self, group: str) -> torch.Tensor:
        return self.largest[group]


def test_modelopt_has_the_ranges_that_it_is_shown(transformer):
    pytest.importorskip("modelopt", reason="needs the extra quantize")
    sides = {group: parts[0].flatten(1).shape[1] for group, parts in PeerLinears(transformer).parts.items()}
    seen: Any = Channels({group: torch.linspace(0.1, 3.0, depth) for group, depth in sides.items()})
    peer = peer_recipes.modelopt_linears(transformer, "INT8_DEFAULT_CFG", seen)
    linear = peer.linears["transformer_blocks/0/attn2/to_q/0"]
    x = torch.tensor([[10.0] * 64])  # beyond the range: clipped to 3
    weight = linear.weight.detach()
    torch.testing.assert_close(linear(x), F.linear(torch.full((1, 64), 3.0), weight), rtol=1e-5, atol=1e-5)


def made(name: str, tool: Any, lpips: list[float], kind: Any = "int8") -> Result:
    candidate = Candidate(name=name, tool=tool, format=kind, size_ratio=0.5, digest="0", products=lambda: torch.no_grad())
    values = {metric: np.zeros(len(lpips)) for metric in METRICS} | {"lpips": np.array(lpips)}
    return Result(candidate=candidate, values=values)


def test_better_worse_and_neither():
    ours, near = made("ours", "sana", [0.1, 0.2, 0.3]), made("near", "modelopt", [0.3, 0.1, 0.3])
    far, best = made("far", "modelopt", [0.2, 0.3, 0.5]), made("best", "torchao", [0.05, 0.1, 0.2])
    said = sentence(ours, [near, far, best], [Unavailable(name="torchao fp8", format="fp8", why="it needs a GPU")])
    assert "near (size 0.500): not told apart in lpips, psnr_db, points_lost." in said
    assert "far (size 0.500): better in lpips; not told apart in psnr_db, points_lost." in said
    assert "best (size 0.500): worse in lpips; not told apart in psnr_db, points_lost." in said
    assert said.endswith("torchao fp8 was not measured: it needs a GPU.")


def test_a_caption_keeps_its_seed_when_more_are_asked_for():
    few, many = (compare_recipes.held_out(compare_recipes.parse([]).judge, count) for count in (2, 5))
    seeds = dict(zip((each.text for each in many), seeds_of(many), strict=True))
    assert [seeds[each.text] for each in few] == seeds_of(few)
    assert len(set(seeds_of(many))) == len(many)


def test_the_page_has_every_recipe_and_picture():
    result = made("a <recipe>", "sana", [0.1, 0.4])
    summary = {
        "what": "pictures",
        "captions": 2,
        "fp32_scene_score": estimate(np.full((2, 1), 50.0)).model_dump(),
        "recipes": {"a <recipe>": result.summary()},
        "sentences": {"int8": "Said & done."},
        "pairs": {"a <recipe>": {"lpips": [0.1, 0.4]}},
    }
    grey = [Image.new("RGB", (64, 64), (level, level, level)) for level in (0, 255)]
    text = page(summary, ["first", "second"], {"fp32": grey, "a <recipe>": grey})
    assert text.count("<img") == 4
    assert text.index("fp32: second") < text.index("fp32: first")  # the worst first
    assert "a &lt;recipe&gt;" in text
    assert "Said &amp; done." in text


@pytest.mark.parametrize("arguments", [["--formats", "int8,int9"], ["--captions", "0"]])
def test_what_cannot_be_asked(arguments, capsys):
    with pytest.raises(SystemExit):
        compare_recipes.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
