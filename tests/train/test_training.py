"""Each kind of training step learns; interrupted training goes on as if nothing had been; bad steps change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train import dit, fast, vae
from train.flat import AdamWConfig, FlatParameters
from train.loop import Budget, Log, Schedule, Stop, Trainer
from train.models import MINUSCULE, make_text_encoder, make_transformer, make_vae
from train.probe import made_up_cache
from train.sprites import Sprites

CPU = torch.device("cpu")
PREFIX, LENGTH = 5, 12


def dit_step(stats: Tensor) -> tuple[FlatParameters, Callable[[], None]]:
    torch.manual_seed(0)
    transformer, encoder = make_transformer(MINUSCULE["transformer"]), make_text_encoder(MINUSCULE["text_encoder"])
    flat = FlatParameters({"transformer": transformer, "text_encoder": encoder}, AdamWConfig(), device=CPU, dtype=torch.float32)
    fast.prepare(transformer, encoder, "eager")
    cache = made_up_cache("256x256", CPU, width=PREFIX + LENGTH - 2, vocabulary=2048, num=8)
    return flat, dit.make_step(transformer, encoder, flat, cache, prefix=PREFIX, batch=8, stats=stats)


def trainer(folder: Path, *, steps: int, stop: Stop | None = None) -> tuple[Trainer, Tensor]:
    stats = torch.zeros(3)
    flat, step = dit_step(stats)
    return Trainer(
        name="dit",
        flat=flat,
        steps={"256x256": step},
        weights={"256x256": 1.0},
        schedule=Schedule(peak=3e-3, warm_up_steps=2),
        budget=Budget(steps=steps),
        log=Log(),
        stop=stop or Stop(),
        stats=stats,
        batch=8,
        checkpoint=folder / "dit.pt",
        log_seconds=math.inf,
    ), stats


def test_dit_step_reduces_the_loss() -> None:
    stats = torch.zeros(3)
    flat, step = dit_step(stats)
    flat.lr.fill_(3e-3)
    means = []
    for _ in range(3):
        stats.zero_()
        for _ in range(10):
            step()
        means.append(float(stats[0] / stats[2]))
    assert means[-1] < 0.97 * means[0]


def test_vae_step_reduces_the_loss(sprites: Sprites) -> None:
    torch.manual_seed(0)
    model, stats = make_vae(MINUSCULE["vae"]), torch.zeros(5)
    flat = FlatParameters({"vae": model}, AdamWConfig(), device=CPU, dtype=torch.float32, channels_last=True)
    source = vae.SceneSource.of(sprites.rgba, {"64x96": (64, 96)}, num=64, seed=0)
    step = vae.make_step(model, flat, source, "64x96", 4, stats)
    flat.lr.fill_(3e-3)
    losses = []
    for _ in range(3):
        stats.zero_()
        for _ in range(8):
            step()
        losses.append(float(stats[0] / stats[2]))
    assert losses[-1] < 0.9 * losses[0]


def test_interrupted_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole, _ = trainer(tmp_path / "whole", steps=6)
    whole.run()
    stop = Stop()
    part, _ = trainer(tmp_path / "part", steps=6, stop=stop)
    inner, calls = part.steps["256x256"], []

    def counted() -> None:
        inner()
        calls.append(1)
        stop.requested = len(calls) == 3  # as SIGTERM would

    part.steps = {"256x256": counted}
    assert not part.run()
    assert part.checkpoint.is_file()
    rest, _ = trainer(tmp_path / "part", steps=6)
    assert rest.resume()
    assert rest.step == 3
    assert rest.run()
    for name, tensor in whole.flat.snapshot().items():
        assert torch.equal(tensor, rest.flat.snapshot()[name]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    flat = FlatParameters({"m": model}, AdamWConfig(), device=CPU, dtype=torch.float32)
    flat.lr.fill_(0.1)
    flat.step_with(model(torch.ones(4, 3)).square().mean())
    before = {name: tensor.clone() for name, tensor in flat.snapshot().items()}
    flat.step_with((model(torch.ones(4, 3)) * bad).sum())
    after = flat.snapshot()
    assert after.pop("skipped") == 1
    before.pop("skipped")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_flat_adamw_equals_torch_adamw() -> None:
    torch.manual_seed(0)
    model, twin = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    twin.load_state_dict(model.state_dict())
    config = AdamWConfig(betas=(0.9, 0.99), weight_decay=0.1, clip=1e9)
    flat = FlatParameters({"m": model}, config, device=CPU, dtype=torch.float32, channels_last=True)
    groups = [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps)
    flat.lr.fill_(1e-2)
    for _ in range(5):
        x = torch.randn(2, 4, 6, 6)
        flat.step_with(model(x).square().mean())
        other.zero_grad()
        twin(x).square().mean().backward()
        other.step()
    torch.testing.assert_close(model.weight, twin.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flat.state_dict("m", average=False)["bias"], twin.bias.detach(), atol=1e-6, rtol=1e-5)


def test_dropping_a_caption_is_the_empty_prompt() -> None:
    """The encoder is causal: <bos> with everything else masked is what the empty prompt gives."""
    torch.manual_seed(0)
    encoder = make_text_encoder(MINUSCULE["text_encoder"])
    ids = torch.zeros(2, PREFIX + LENGTH - 2, dtype=torch.long)
    ids[:, 0] = 2
    ids[0, 1:9] = torch.arange(20, 28)
    text, mask = dit.encode_text(encoder, ids, PREFIX)
    torch.testing.assert_close(text[0, 0], text[1, 0])
    assert mask.tolist() == [[1] * 6 + [0] * 6, [1] + [0] * 11]


def test_shifted_depthwise_equals_the_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    got, wanted = fast.depthwise_shifted(x, conv.weight, conv.bias), conv(x)
    torch.testing.assert_close(got, wanted)
    grad = torch.randn_like(wanted)
    leaves = (x, conv.weight, conv.bias)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad))
