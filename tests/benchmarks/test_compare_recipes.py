"""Recipes beside each other: products that are replaced, what is said of them, and the page."""

import contextlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_build import quiet, tiny
from torch import nn

from benchmarks import compare_recipes, peer_recipes
from benchmarks.compare_recipes import METRICS, Result, rounds, seeds_of, sentence
from benchmarks.half_products import HalfProducts
from benchmarks.peer_recipes import FP16, FP32, Candidate, OurLinears, PeerLinears, Unavailable, unquantized
from benchmarks.recipe_pictures import Job, draw_all
from benchmarks.recipes_page import page
from engines.errors import SpecError
from engines.store import Store
from export.metrics.pictures import estimate
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference
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


@pytest.mark.slow
def test_modelopt_has_the_ranges_that_it_is_shown(transformer):
    pytest.importorskip("modelopt", reason="needs the extra quantize")
    sides = {group: parts[0].flatten(1).shape[1] for group, parts in PeerLinears(transformer).parts.items()}
    seen: Any = Channels({group: torch.linspace(0.1, 3.0, depth) for group, depth in sides.items()})
    peer = peer_recipes.modelopt_linears(transformer, "INT8_DEFAULT_CFG", seen)
    linear = peer.linears["transformer_blocks/0/attn2/to_q/0"]
    x = torch.tensor([[10.0] * 64])  # beyond the range: clipped to 3
    weight = linear.weight.detach()
    torch.testing.assert_close(linear(x), F.linear(torch.full((1, 64), 3.0), weight), rtol=1e-5, atol=1e-5)


def candidate(name: str, tool: Any = "sana", kind: str = "int8") -> Candidate:
    return Candidate(
        name=name, tool=tool, format=kind, size_ratio=0.5, digest="0", weights={}, products=lambda _: contextlib.nullcontext()
    )


def made(name: str, tool: Any, lpips: list[float], places: tuple[int, ...] = (0, 1, 2)) -> Result:
    """One picture a caption."""
    values = {metric: np.zeros((len(lpips), 1)) for metric in METRICS} | {"lpips": np.array(lpips)[:, None]}
    return Result(candidate=candidate(name, tool), places=places, values=values)


def test_better_worse_and_neither():
    ours, near = made("ours", "sana", [0.1, 0.2, 0.3]), made("near", "modelopt", [0.3, 0.1, 0.3])
    far, best = made("far", "modelopt", [0.2, 0.3, 0.5]), made("best", "torchao", [0.05, 0.1, 0.2])
    said = sentence(ours, [near, far, best], [Unavailable(name="torchao fp8", format="fp8", why="it needs a GPU")])
    assert "near (size 0.500), 3 pictures: not told apart in lpips, psnr_db, points_lost." in said
    assert "far (size 0.500), 3 pictures: better in lpips; not told apart in psnr_db, points_lost." in said
    assert "best (size 0.500), 3 pictures: worse in lpips; not told apart in psnr_db, points_lost." in said
    assert said.endswith("torchao fp8 was not measured: it needs a GPU.")


def test_a_peer_is_compared_on_what_it_has_drawn():
    """Ours is far worse on the caption that the peer has not, and a little better on those that it has."""
    ours, peer = made("ours", "sana", [0.1, 9.0, 0.2]), made("peer", "modelopt", [0.2, 0.3], places=(0, 2))
    assert ours.beside(peer, "lpips").tolist() == [[0.1], [0.2]]
    assert "peer (size 0.500), 2 pictures: better in lpips" in sentence(ours, [peer])


def test_a_picture_keeps_its_seed_when_more_are_asked_for():
    few, many = (compare_recipes.held_out(compare_recipes.parse([]).judge, count) for count in (2, 5))
    seeds = dict(zip((each.text for each in many), seeds_of(many, 3), strict=True))
    assert [seeds[each.text][:2] for each in few] == seeds_of(few, 2)
    assert len({seed for each in seeds_of(many, 3) for seed in each}) == 3 * len(many)


def test_what_is_drawn_first():
    """A run that stops anywhere has each round whole: every candidate, and every kind of scene."""
    questions = compare_recipes.held_out(compare_recipes.parse([]).judge, 2)
    who = [candidate("a"), candidate("b")]
    jobs = rounds(who, list(zip(questions, seeds_of(questions, 2), strict=True)))
    kinds = {each.text: each.scene.kind for each in questions}
    first = {question.text: seeds[0] for question, seeds in zip(questions, seeds_of(questions, 2), strict=True)}
    assert len({job.key for job in jobs}) == len(jobs) == 2 * 2 * len(questions)
    assert {(job.candidate.name, kinds[job.text]) for job in jobs[:10]} == {(name, kind) for name in "ab" for kind in range(5)}
    assert all(job.seed == first[job.text] for job in jobs[:20])


def test_the_page_has_every_recipe_and_picture():
    result = made("a <recipe>", "sana", [0.1, 0.4], places=(0, 1))
    summary = {
        "what": "pictures",
        "scene_scores": {"fp32": estimate(np.full((2, 1), 50.0)).model_dump()},
        "recipes": {"a <recipe>": result.summary()},
        "sentences": {"int8": "Said & done."},
        "pairs": {"a <recipe>": {"lpips": [[0.1], [0.4]]}, "a peer": {"lpips": [[0.9]]}},
    }
    drawn = [("fp32", "first", 0), ("fp32", "second", 7), ("a <recipe>", "first", 0), ("a <recipe>", "second", 7)]
    pictures = {key: Image.new("RGB", (64, 64)) for key in [*drawn, ("a peer", "first", 0)]}
    text = page(summary, [("first", [0]), ("second", [7])], pictures)
    assert text.count("<img") == 5
    assert text.index("fp32: second") < text.index("fp32: first")  # the worst first
    assert "a &lt;recipe&gt;" in text
    assert "Said &amp; done." in text
    assert "<td>2<td>0.500" in text


def test_products_of_half_numbers_are_summed_in_fp32():
    """One rounding: exact for fp16 numbers, and what fp32 gives for fp32."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 512, generator=generator).half(), nn.Parameter(torch.randn(5, 512, generator=generator).half())
    bias = nn.Parameter(torch.randn(5, generator=generator).half())
    exact = F.linear(x.double(), weight.double(), bias.double())
    image, kernel = torch.randn(1, 4, 6, 6, generator=generator).bfloat16(), torch.randn(4, 1, 3, 3, generator=generator).bfloat16()
    with torch.inference_mode(), HalfProducts() as mode:
        got, again = F.linear(x, weight, bias=bias), x @ weight.mT
        conv = F.conv2d(image, kernel, None, padding=1, groups=4)
    assert (got.dtype, again.dtype, conv.dtype) == (torch.float16, torch.float16, torch.bfloat16)
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-11 + 1e-4).all()
    assert torch.equal(conv, F.conv2d(image.float(), kernel.float(), padding=1, groups=4).bfloat16())
    assert len(mode._weights) == 2  # parameters, widened once


def test_pictures_of_a_share_are_those_of_the_whole(tmp_path):
    """And the cache has them: nothing is drawn anew. Candidates differ by what they quantize."""
    checkpoint = load(tiny())
    exact, half = unquantized(FP32), unquantized(FP16)
    narrow = replace(half, name="int4", digest="int4", weights={"text_encoder": "int4", "text_projection": "int4"})
    jobs = [Job(each, "a", 0) for each in (exact, half, narrow)]
    store, progress = Store(tmp_path), quiet()
    whole = draw_all(checkpoint, jobs, store, progress)
    assert len({picture.tobytes() for picture in whole.values()}) == 3
    broken = [job._replace(candidate=replace(job.candidate, products=None)) for job in jobs]  # would raise if it were drawn
    assert draw_all(checkpoint, broken[1:], store, progress) == {job.key: whole[job.key] for job in jobs[1:]}


@pytest.mark.parametrize(
    "arguments",
    [["--formats", "int8,int9"], ["--captions", "0"], ["--peer-captions", "11"], ["--seeds", "101"], ["--share", "2/2"]],
)
def test_what_cannot_be_asked(arguments, capsys):
    with pytest.raises(SystemExit):
        compare_recipes.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_activations_of_the_text_encoder_are_for_another_program(tmp_path):
    """Said before anything is calibrated."""
    with pytest.raises(SpecError, match=r"got w8a8; expected weights alone.*text_weights"):
        peer_recipes.candidates(SanaReference(tiny()), ["int8"], ["text_encoder=w8a8"], store=Store(tmp_path), progress=quiet())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_whole_run_measures_writes_and_records(tmp_path, monkeypatch, capsys):
    """Pictures are noise whose size says who drew them: fp16 next to fp32, ours farther from fp16, the peer farther still."""
    noise = {"fp32": 0, "fp16": 1, "sana int8": 8, "modelopt x": 32}

    def draw(checkpoint, jobs, store, progress):
        found = {}
        for job in jobs:
            generator = np.random.default_rng(job.seed)
            base, added = generator.integers(40, 200, (64, 64, 3)), generator.standard_normal((64, 64, 3))
            levels = base + noise[job.candidate.name] * added
            found[job.key] = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        return found

    recorded: dict[str, tuple[float, dict[str, Any]]] = {}
    found = [candidate("sana int8"), candidate("modelopt x", "modelopt")], []
    monkeypatch.setattr(compare_recipes, "draw_all", draw)
    monkeypatch.setattr(compare_recipes, "candidates", lambda *args, **more: found)
    monkeypatch.setattr(compare_recipes, "record", lambda name, value, unit, **more: recorded.update({name: (value, more)}))
    words = ["--formats", "int8", "--captions", "2", "--seeds", "2", "--peer-captions", "1", "--record"]
    files = ["--out", str(tmp_path / "out.json"), "--page", str(tmp_path / "page.html"), "--cache", str(tmp_path)]
    assert compare_recipes.main([*words, *files]) == 0
    assert set(recorded) == {
        f"quant_{kind}_{name}" for kind in ("fp16", "int8") for name in ("scene_points_lost", "psnr_db", "lpips")
    }
    value, more = recorded["quant_int8_psnr_db"]
    assert 17 < more["peer"]["modelopt x"] < value - 6 < recorded["quant_fp16_psnr_db"][0] - 12
    assert "10 captions kept out, 2 seeds each; simulated in PyTorch, against fp16's pictures" in more["note"]
    assert "peers: 5 of these pictures" in more["note"]
    assert "5 captions kept out, 1 seeds each; simulated in PyTorch, against fp32's" in recorded["quant_fp16_lpips"][1]["note"]
    summary = json.loads((tmp_path / "out.json").read_text())
    assert np.array(summary["pairs"]["sana int8"]["lpips"]).shape == (10, 2)
    assert "better in lpips, psnr_db" in summary["sentences"]["int8"]
    assert set(summary["scene_scores"]) == {"fp32", "fp16", "sana int8"}
    assert "sana int8 (size 0.500) beside modelopt x (size 0.500), 5 pictures" in capsys.readouterr().out
