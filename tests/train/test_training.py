"""Each kind of training step learns; interrupted training goes on as if nothing had been; bad steps change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sana_ref import ops
from train.tiny import dit, fast, vae
from train.tiny.flat import AdamWConfig, FlatParameters
from train.tiny.loop import Budget, Log, Schedule, Trainer
from train.tiny.models import MINUSCULE, make_text_encoder, make_transformer, make_vae
from train.tiny.sprites import Sprites
from train.trainer.stop import Stop

CPU = torch.device("cpu")
PREFIX, LENGTH = 5, 12


def dit_step(stats: Tensor) -> tuple[FlatParameters, Callable[[], None]]:
    torch.manual_seed(0)
    transformer, encoder = make_transformer(MINUSCULE["transformer"]), make_text_encoder(MINUSCULE["text_encoder"])
    flat = FlatParameters({"transformer": transformer, "text_encoder": encoder}, AdamWConfig(), device=CPU, dtype=torch.float32)
    fast.one_hot_embedding(encoder)
    cache = dit.LatentCache(
        latents=torch.randn(8, 32, 8, 8),
        ids=torch.randint(4, 2048, (8, 1, PREFIX + LENGTH - 2)).short(),
        facts=torch.zeros(8, 4, dtype=torch.long),
    )
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


def test_one_hot_embedding_equals_the_embedding() -> None:
    torch.manual_seed(0)
    plain, one_hot = (make_text_encoder(MINUSCULE["text_encoder"]) for _ in range(2))
    one_hot.load_state_dict(plain.state_dict())
    fast.one_hot_embedding(one_hot)
    ids = torch.randint(4, 2048, (2, 7))
    outputs = [encoder(ids, torch.ones_like(ids)) for encoder in (plain, one_hot)]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad(out.square().sum(), encoder.embed_tokens.weight)[0]
        for out, encoder in zip(outputs, (plain, one_hot), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_plain_attention_ends_with_its_block() -> None:
    op = ops.relu_linear_attention
    with fast.plain_attention():
        assert ops.relu_linear_attention is ops.relu_linear_attention_truth
    assert ops.relu_linear_attention is op
