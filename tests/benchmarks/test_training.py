"""The count of FLOPs against one by hand, and the training benchmark at a size for a CPU."""

import argparse
import copy
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks import training, training_step
from benchmarks.flops import forward_flops, operator_flops, peak_flops, training_flops
from benchmarks.training import Settings
from engines.errors import SpecError
from sana_ref.layers import GLUMBConv
from sana_ref.transformer import SanaTransformerConfig

CONFIG = SanaTransformerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=24,
    sample_size=4,
)


def by_hand(batch: int, tokens: int, text: int) -> int:
    dim, inner, caption = 64, 160, 24
    linear = 4 * dim * dim * tokens + 2 * 32 * dim * tokens + 2 * dim * tokens  # q, k, v, out; state and numerator; normaliser
    cross = 2 * dim * dim * tokens + 2 * dim * dim * text + 2 * tokens * text * dim
    feed_forward = (dim * 2 * inner + 2 * inner * 9 + inner * dim) * tokens
    block = linear + cross + feed_forward
    ends = 4 * dim * tokens + dim * 4 * tokens + (caption * dim + dim * dim) * text  # patches in, pixels out, caption projection
    time = 256 * dim + dim * dim + 6 * dim * dim
    return 2 * batch * (2 * block + ends + time)


def test_flops_are_those_that_a_person_counts() -> None:
    assert forward_flops(CONFIG, batch=3, height=4, width=6, tokens=7) == by_hand(3, 24, 7)
    assert training_flops(CONFIG, batch=1, height=4, width=4, tokens=7) == 3 * by_hand(1, 16, 7)
    counts = list(operator_flops(CONFIG, batch=1, height=4, width=4, tokens=7).values())
    assert counts == sorted(counts, reverse=True)


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("some other card") is None


def measure(*settings: Settings, peer: bool = True, limit_s: float = float("inf")) -> training.Found:
    device = torch.device("cpu")
    return training.measure(CONFIG, settings, side=4, device=device, steps=1, peer=peer, tokens=7, limit_s=limit_s)


@pytest.mark.slow
def test_the_benchmark_checks_and_times_both() -> None:
    candidates = list(training.combinations([2, 3], attentions=["op", "plain"]))
    found = measure(*candidates)
    assert found.rms_error.keys() == {"op", "plain", "diffusers"}
    assert 0 < max(found.rms_error["op"], found.rms_error["plain"]) <= 2 * found.rms_error["diffusers"] < 0.1
    assert list(found.timings) == candidates
    assert all(timing.step_s > 0 for timing in found.timings.values())
    assert isinstance(found.peer, training.Timing)
    assert found.timings[found.best].parts_s.keys() == {"passes", "clip", "update"}


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gone wrong in bf16: heads swapped. The exact prediction is fp32, which it leaves alone."""
    right = torch.nn.functional.scaled_dot_product_attention

    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> torch.Tensor:
        ours = more.get("scale") == 1.0
        return right(q, k, v.flip(1) if ours and v.dtype == torch.bfloat16 else v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", swapped)
    found = measure(Settings(batch=2))
    assert found.rms_error["op"] > 2 * found.rms_error["diffusers"]
    assert not found.timings


def test_a_compiled_model_with_another_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module, **_: object) -> None:
        with torch.no_grad():
            model.proj_out.weight.mul_(2)

    monkeypatch.setattr(training, "prepare", broken)
    with pytest.raises(SpecError, match=r"got a first loss of .* as without compilation"):
        measure(Settings(batch=2, compile="blocks"), peer=False)


@pytest.mark.slow
def test_what_does_not_fit_or_comes_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.Step.passes

    def passes(self: training.Step) -> None:
        if len(self.batch["latents"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        right(self)

    monkeypatch.setattr(training.Step, "passes", passes)
    small, large = Settings(batch=2), Settings(batch=3)
    found = measure(large, small, replace(small, attention="plain"), peer=False, limit_s=0)
    assert list(found.timings) == [small]
    assert found.failures == {large: "out of memory", replace(small, attention="plain"): "not tried: --limit-s has gone by"}


@pytest.mark.parametrize(("checkpointing", "feed_forward"), [(False, "plain"), (True, "fused")])
def test_a_step_learns(checkpointing: bool, feed_forward: str) -> None:
    device = torch.device("cpu")
    model = training_step.ours(CONFIG, device)
    training_step.prepare(model, compile="none", checkpointing=checkpointing, feed_forward=feed_forward)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step.Step(model, training_step.random_batch(CONFIG, 2, 4, device, tokens=7))()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_pointwise_convolutions_as_products_change_nothing() -> None:
    torch.manual_seed(0)
    convolution = GLUMBConv(8, expand_ratio=2.5, norm=False).double()
    product = copy.deepcopy(convolution)
    training_step.pointwise_as_products(product)
    x = torch.randn(2, 3, 5, 8).double().permute(0, 3, 1, 2)
    expected, got = convolution(x), product(x)
    assert ["forward" in vars(module) for module in product.children()] == [True, False, True]
    torch.testing.assert_close(got, expected)
    for y in (expected, got):
        (y * x).sum().backward()
    for a, b in zip(convolution.parameters(), product.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs a C++ compiler on a CPU")
@pytest.mark.parametrize(("attention", "feed_forward"), [("plain", "matmul"), ("op", "fused")])
def test_compiled_blocks_have_the_same_loss(attention: str, feed_forward: str) -> None:
    found = measure(Settings(batch=2, compile="blocks", attention=attention, feed_forward=feed_forward), peer=False)
    assert found.timings


def test_a_peer_that_cannot_be_made_is_named() -> None:
    config = replace(CONFIG, interpolation_scale=1.0, sample_size=4)
    with pytest.raises(SpecError, match=r"table of positions.*Use --no-peer"):
        training_step.theirs(config, torch.device("cpu"))


def test_lists_on_the_command_line() -> None:
    assert training.choices("none", "blocks")("blocks,none") == ["blocks", "none"]
    with pytest.raises(argparse.ArgumentTypeError, match="got block; expected some of none, blocks"):
        training.choices("none", "blocks")("block")
