"""The count of FLOPs against one by hand, and the training benchmark at a size for a CPU."""

from dataclasses import replace

import pytest
import torch

from benchmarks import training
from benchmarks.flops import forward_flops, peak_flops, training_flops
from engines.errors import SpecError
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


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("some other card") is None


def test_the_benchmark_checks_and_times_both() -> None:
    batch = training.Batch.random(CONFIG, 2, 4, torch.device("cpu"), tokens=7)
    found = training.measure(CONFIG, batch, steps=1, compiled=False, peer=True)
    assert 0 < found["rms_error"]["ours"] <= 2 * found["rms_error"]["diffusers"] < 0.1
    assert found["ours_s"] > 0
    assert found["diffusers_s"] > 0
    assert found["mfu"] is None


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gone wrong in bf16: heads swapped. The exact prediction is fp32, which it leaves alone."""
    right = torch.nn.functional.scaled_dot_product_attention

    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> torch.Tensor:
        ours = more.get("scale") == 1.0
        return right(q, k, v.flip(1) if ours and v.dtype == torch.bfloat16 else v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", swapped)
    batch = training.Batch.random(CONFIG, 2, 4, torch.device("cpu"), tokens=7)
    found = training.measure(CONFIG, batch, steps=1, compiled=False, peer=True)
    assert found["rms_error"]["ours"] > 2 * found["rms_error"]["diffusers"]
    assert "ours_s" not in found


def test_a_step_learns() -> None:
    batch = training.Batch.random(CONFIG, 2, 4, torch.device("cpu"), tokens=7)
    model = training.ours(CONFIG, training.random_weights(CONFIG, batch.t.device))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.make_step(model, batch, compiled=False)()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_peer_that_cannot_be_made_is_named() -> None:
    config = replace(CONFIG, interpolation_scale=1.0, sample_size=4)
    with pytest.raises(SpecError, match=r"table of positions.*Use --no-peer"):
        training.theirs(config, training.random_weights(config, torch.device("cpu")))
