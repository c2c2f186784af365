"""Our models against diffusers' and transformers': the same parameters at every published size, the same numbers at small ones."""

import dataclasses

import diffusers
import pytest
import torch
import transformers
from parity import twins
from small_models import TEXT_CHANNELS, narrow, tiny_transformer_config

from sana_ref.autoencoder import AutoencoderDC
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel
from sana_ref.variants import DC_AE, DC_AE_LITE, GEMMA_2_2B, VARIANTS

BOUND = 1e-5  # fp32, relative to the largest value: the order of sums is free, the rest is not
SHAPES = [(8, 8), (16, 16), (10, 22)]  # latent cells: two sizes and one aspect ratio
QK_NORM = {"qk_norm": "rms_norm_across_heads"}


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_published_transformer_has_the_same_parameters(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        ours = SanaTransformer2DModel(variant.transformer)
        theirs = diffusers.SanaTransformer2DModel(**dataclasses.asdict(variant.transformer))
    assert shapes(ours) == shapes(theirs)
    assert count(ours) == variant.num_parameters


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"), [(DC_AE, 153_027_104, 159_223_171), (DC_AE_LITE, 153_027_104, 268_154_124)]
)
def test_published_autoencoder_has_the_same_parameters(config, encoder, decoder):
    with torch.device("meta"):
        ours, theirs = AutoencoderDC(config), diffusers.AutoencoderDC(**dataclasses.asdict(config))
    assert shapes(ours) == shapes(theirs)
    assert (count(ours.encoder), count(ours.decoder)) == (encoder, decoder)


def test_published_text_encoder_has_the_same_parameters():
    with torch.device("meta"):
        ours = Gemma2Encoder(GEMMA_2_2B)
        theirs = transformers.Gemma2Model(transformers.Gemma2Config())  # its defaults are the 2B model
    assert shapes(ours) == shapes(theirs)
    assert Gemma2Config.from_json(transformers.Gemma2Config().to_dict()) == dataclasses.replace(
        GEMMA_2_2B, layer_types=("sliding_attention", "full_attention") * 13
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        QK_NORM,
        QK_NORM | {"guidance_embeds": True},
        {"sample_size": 64, "interpolation_scale": 1.0},
        {"sample_size": 128, "interpolation_scale": 2.0},
        {"sample_size": 8, "interpolation_scale": 1.0, "patch_size": 2},
        {"attention_bias": True, "norm_elementwise_affine": True, "in_channels": 4, "out_channels": 8},
    ],
    ids=["1.0", "1.5", "sprint", "2k", "4k", "patch_2", "other_options"],
)
@torch.no_grad()
def test_transformer_gives_the_same_numbers(changes):
    config = tiny_transformer_config(**changes)
    ours, theirs = twins.transformer_twins(config)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 30, TEXT_CHANNELS, generator=generator)
    mask = (torch.arange(30) < torch.tensor([[7], [30]])).long()
    timestep = torch.tensor([0.98, 0.5] if config.guidance_embeds else [999.0, 136.5])
    guidance = torch.tensor([0.45, 0.1]) if config.guidance_embeds else None
    for height, width in SHAPES:
        latents = torch.randn(2, config.in_channels, height, width, generator=generator)
        for text_mask in (mask, None):
            got = ours(latents, text, timestep, text_mask, guidance)
            expected = theirs(latents, text, timestep, guidance, text_mask, return_dict=False)[0]
            assert twins.relative_error(got, expected) < BOUND, f"{height} x {width}"


WIDE = [pytest.param(name, marks=pytest.mark.slow) for name in ("sprint_1600m_1024px", "sana_1600m_4kpx")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana_600m_1024px", *WIDE])
@torch.no_grad()
def test_published_width_gives_the_same_numbers(name):
    config = dataclasses.replace(VARIANTS[name].transformer, num_layers=1, caption_channels=TEXT_CHANNELS)
    ours, theirs = twins.transformer_twins(config)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 32, 6, 8, generator=generator)
    text = torch.randn(1, 10, TEXT_CHANNELS, generator=generator)
    timestep = torch.tensor([0.98 if config.guidance_embeds else 999.0])
    guidance = torch.tensor([0.45]) if config.guidance_embeds else None
    expected = theirs(latents, text, timestep, guidance, return_dict=False)[0]
    assert twins.relative_error(ours(latents, text, timestep, None, guidance), expected) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("config", [DC_AE, DC_AE_LITE], ids=["full", "lite"])
@torch.no_grad()
def test_autoencoder_gives_the_same_numbers(config):
    ours, theirs = twins.autoencoder_twins(narrow(config))
    generator = torch.Generator().manual_seed(1)
    # 64 x 64 px has 4, 16 and 64 pixels in the stages with attention: below and above diffusers' switch at 32
    for height, width in ((64, 64), (128, 128), (96, 224)):
        images = torch.randn(2, 3, height, width, generator=generator)
        latents = theirs.encode(images, return_dict=False)[0]
        assert twins.relative_error(ours.encode(images), latents) < BOUND, f"encode {height} x {width}"
        decoded = theirs.decode(latents, return_dict=False)[0]
        assert twins.relative_error(ours.decode(latents), decoded) < BOUND, f"decode {height} x {width}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 5},
        {"attn_logit_softcapping": 2.0},
        {"layer_types": ["full_attention"] * 4, "attn_logit_softcapping": None},
    ],
    ids=["defaults", "short_window", "low_cap", "no_window_no_cap"],
)
@torch.no_grad()
def test_text_encoder_gives_the_same_numbers(changes):
    ours, theirs = twins.text_encoder_twins(**changes)
    ids = torch.randint(0, 400, (3, 23), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(23) < torch.tensor([[23], [9], [1]])).long()
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    assert twins.relative_error(ours(ids, mask), expected) < BOUND
