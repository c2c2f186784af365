"""In 16 bits our models may err at most twice as much as diffusers' and transformers' do, against fp32 with the same weights."""

import copy

import pytest
import torch
from parity import twins
from parity.bound import assert_parity
from small_models import TEXT_CHANNELS, narrow, tiny_transformer_config

from sana_ref.variants import DC_AE, DC_AE_LITE


def narrowed(ours, theirs, dtype):
    """Both in 16 bits, and the published one in fp32 with the rounded weights: the answer that both should give."""
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    return ours, theirs, copy.deepcopy(theirs).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": "rms_norm_across_heads"}, {"interpolation_scale": 2.0, "sample_size": 128}],
    ids=["1.0", "1.5", "4k"],
)
@torch.no_grad()
def test_transformer(changes, dtype):
    ours, theirs, exact = narrowed(*twins.transformer_twins(tiny_transformer_config(**changes)), dtype)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 32, 12, 16, generator=generator).to(dtype)
    text = torch.randn(2, 30, TEXT_CHANNELS, generator=generator).to(dtype)
    mask = (torch.arange(30) < torch.tensor([[7], [30]])).long()
    timestep = torch.tensor([999.0, 136.5])
    assert_parity(
        ours(latents, text, timestep, mask),
        same=theirs(latents, text, timestep, None, mask, return_dict=False)[0],
        exact=exact(latents.float(), text.float(), timestep, None, mask, return_dict=False)[0],
        name=f"transformer {changes} {dtype}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", [DC_AE, DC_AE_LITE], ids=["full", "lite"])
@torch.no_grad()
def test_autoencoder(config):
    ours, theirs, exact = narrowed(*twins.autoencoder_twins(narrow(config)), torch.bfloat16)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    latents = exact.encode(images.float(), return_dict=False)[0]
    assert_parity(ours.encode(images), same=theirs.encode(images, return_dict=False)[0], exact=latents, name="encoder")
    halved = latents.bfloat16()
    assert_parity(
        ours.decode(halved),
        same=theirs.decode(halved, return_dict=False)[0],
        exact=exact.decode(halved.float(), return_dict=False)[0],
        name="decoder",
    )


@torch.no_grad()
def test_text_encoder():
    ours, theirs, exact = narrowed(*twins.text_encoder_twins(), torch.bfloat16)
    ids = torch.randint(0, 400, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) < torch.tensor([[40], [19], [1]])).long()
    assert_parity(
        ours(ids, mask),
        same=theirs(ids, attention_mask=mask).last_hidden_state,
        exact=exact(ids, attention_mask=mask).last_hidden_state,
        name="text encoder",
    )
