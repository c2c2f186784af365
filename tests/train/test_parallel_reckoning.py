from dataclasses import replace

import pytest
import torch

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from sana_ref.variants import VARIANTS
from train.parallel.reckoning import activation_bytes, reckon

SMALL = SanaTransformerConfig(
    num_attention_heads=2,
    num_layers=3,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=24,
)
SHAPE = {"batch": 2, "height": 4, "width": 6, "tokens": 7}
GB = 10**9


@pytest.mark.parametrize("num_layers", [1, 3, 5])
def test_activations_are_those_that_a_real_forward_pass_keeps(num_layers: int) -> None:
    config = replace(SMALL, num_layers=num_layers)
    model = SanaTransformer2DModel(config).to(torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latents, text = torch.randn(2, 32, 4, 6).bfloat16(), torch.randn(2, 7, 24).bfloat16()
        model(latents, text, torch.rand(2), torch.ones(2, 7))
    size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    counted = activation_bytes(config, **SHAPE, checkpointing=False)
    assert counted == pytest.approx(size, rel=0.02)


def test_checkpointing_keeps_one_block_and_the_inputs_of_all() -> None:
    deep = replace(SMALL, num_layers=12)
    all_kept = activation_bytes(deep, **SHAPE, checkpointing=False)
    some = activation_bytes(deep, **SHAPE, checkpointing=True)
    assert some < all_kept / 4
    more = activation_bytes(replace(deep, num_layers=13), **SHAPE, checkpointing=True)
    assert more - some == 2 * 24 * 64 * 2  # one more input of (2, 24, 64) in bf16


@pytest.mark.parametrize(
    ("variant", "world_size", "checkpointing", "wanted"),
    [
        ("sana_600m_512px", 1, False, "single"),
        ("sana_1600m_1024px", 8, True, "ddp"),
        ("sana_1_5_4800m_1024px", 8, True, "fsdp2"),
    ],
)
def test_published_sizes_on_80_gb(variant: str, world_size: int, checkpointing: bool, wanted: str) -> None:
    config = VARIANTS[variant].transformer
    side = config.sample_size
    found = reckon(
        config, world_size=world_size, memory=80 * GB, batch=4, height=side, width=side, tokens=300, checkpointing=checkpointing
    )
    assert found.strategy == wanted
    assert found.total < 0.9 * 80 * GB
    said = str(found)
    assert said.startswith(f"{wanted} on {world_size} GPU")
    assert "optimizer state" in said
    assert f"{found.total / 1e9:.2f} GB" in said


def test_a_sharded_state_is_a_share_of_it() -> None:
    common = {"memory": 80 * GB, **SHAPE}
    ddp, two, eight = (reckon(SMALL, world_size=n, strategy=s, **common) for n, s in ((2, "ddp"), (2, "fsdp2"), (8, "fsdp2")))
    for name in ("weights, fp32", "gradients", "optimizer state", "EMA"):
        assert two.parts[name] == -(-ddp.parts[name] // 2)
        assert eight.parts[name] == -(-ddp.parts[name] // 8)
    assert two.parts["activations"] == ddp.parts["activations"]


@pytest.mark.slow
def test_what_does_not_fit_says_what_would_help() -> None:
    config = VARIANTS["sana_1_5_4800m_1024px"].transformer
    with pytest.raises(ValueError, match="activation checkpointing, adamw8bit, more GPUs"):
        reckon(config, world_size=2, memory=24 * GB, batch=8, height=32, width=32, tokens=300)
    shape = {"world_size": 2, "memory": 24 * GB, "batch": 8, "height": 32, "width": 32, "tokens": 300, "checkpointing": True}
    told = reckon(config, strategy="ddp", **shape)
    assert (told.strategy, told.fits, told.remedies) == ("ddp", False, ("a smaller micro-batch", "adamw8bit", "fsdp2"))
    with pytest.raises(ValueError, match="adamw, which can be sharded"):
        reckon(config, optimizer="came", **shape)


def test_gradients_that_wait_for_the_last_micro_batch_are_whole() -> None:
    one, two = (reckon(SMALL, world_size=2, memory=GB, strategy="fsdp2", accumulation=n, **SHAPE) for n in (1, 2))
    assert two.total - one.total == pytest.approx(2 * one.parts["weights, fp32"], abs=4)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'sgd'; expected one of adamw"):
        reckon(SMALL, world_size=1, memory=GB, optimizer="sgd", **SHAPE)
    with pytest.raises(ValueError, match="got fsdp2 with came; expected adamw, or ddp"):
        reckon(SMALL, world_size=2, memory=GB, optimizer="came", strategy="fsdp2", **SHAPE)
    with pytest.raises(ValueError, match="got single with 2 processes"):
        reckon(SMALL, world_size=2, memory=GB, strategy="single", **SHAPE)
