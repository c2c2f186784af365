"""What holds for the models whatever their weights: which inputs matter, precisions, gradients, export with free sizes."""

import dataclasses

import pytest
import torch
from small_models import TEXT_CHANNELS, narrow, randomise, tiny_transformer_config
from torch.export import Dim, export

from sana_ref.autoencoder import AutoencoderDC
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.text_encoder import fuse as fuse_text
from sana_ref.transformer import SanaTransformer2DModel
from sana_ref.variants import DC_AE, DC_AE_LITE

TINY_GEMMA = Gemma2Config(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=4,
)
BATCH, HEIGHT, WIDTH = Dim("batch", max=64), Dim("height", max=128), Dim("width", max=128)


def made(model):
    randomise(model)
    return model.eval()


def inputs(config, batch=2, height=6, width=8, length=10):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.in_channels, height, width, generator=generator)
    text = torch.randn(batch, length, TEXT_CHANNELS, generator=generator)
    mask = (torch.arange(length) < torch.tensor([length - 4] * batch)[:, None]).float()
    guidance = torch.full((batch,), 0.45) if config.guidance_embeds else None
    return latents, text, torch.full((batch,), 500.0), mask, guidance


@torch.no_grad()
def test_masked_text_does_not_matter_and_other_text_does():
    model = made(SanaTransformer2DModel(tiny_transformer_config()))
    latents, text, timestep, mask, _ = inputs(model.config)
    out = model(latents, text, timestep, mask)
    noisy = torch.where(mask[..., None] == 0, torch.full_like(text, 50.0), text)
    torch.testing.assert_close(model(latents, noisy, timestep, mask), out)
    assert not torch.allclose(model(latents, noisy, timestep), out, atol=1e-3)


@torch.no_grad()
def test_images_of_a_batch_do_not_meet():
    model = made(SanaTransformer2DModel(tiny_transformer_config(interpolation_scale=1.0)))
    latents, text, timestep, mask, _ = inputs(model.config, batch=3)
    together = model(latents, text, timestep, mask)
    alone = torch.cat([model(latents[i : i + 1], text[i : i + 1], timestep[:1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_token_sees_every_other():
    model = made(SanaTransformer2DModel(tiny_transformer_config(num_layers=1)))
    latents, text, timestep, mask, _ = inputs(model.config, batch=1, height=8, width=8)
    changed = latents.clone()
    changed[..., 0, 0] += 5
    assert (model(changed, text, timestep, mask) - model(latents, text, timestep, mask))[..., -1, -1].abs().max() > 1e-4


def test_guidance_is_required_where_it_is_embedded_and_refused_elsewhere():
    embedded, plain = (SanaTransformer2DModel(tiny_transformer_config(guidance_embeds=flag)) for flag in (True, False))
    latents, text, timestep, mask, guidance = inputs(embedded.config)
    with pytest.raises(ValueError, match="got no guidance"):
        embedded(latents, text, timestep, mask)
    with pytest.raises(ValueError, match="got guidance; expected None"):
        plain(latents, text, timestep, mask, guidance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_stays_near_fp32(dtype):
    model = made(SanaTransformer2DModel(tiny_transformer_config(qk_norm="rms_norm_across_heads", interpolation_scale=2.0)))
    latents, text, timestep, mask, _ = inputs(model.config)
    wide = model(latents, text, timestep, mask)
    half = model.to(dtype)(latents.to(dtype), text.to(dtype), timestep, mask)
    assert half.dtype == dtype
    assert (half.float() - wide).abs().max() < 40 * torch.finfo(dtype).eps * wide.abs().max()


def test_fp16_overflow_is_clipped_as_published():
    model = made(SanaTransformer2DModel(tiny_transformer_config(num_layers=1)))
    attention = model.transformer_blocks[0].attn1.half()
    with torch.no_grad():
        attention.to_out[0].weight.fill_(60000.0)
        out = attention(torch.ones(1, 4, model.config.dim, dtype=torch.float16))
    assert out.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_transformer_trains(autocast):
    config = tiny_transformer_config(qk_norm="rms_norm_across_heads", guidance_embeds=True, interpolation_scale=1.0)
    model = SanaTransformer2DModel(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*inputs(config)).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", [DC_AE, DC_AE_LITE], ids=["full", "lite"])
def test_autoencoder_trains_and_halves_five_times(config):
    model = AutoencoderDC(narrow(config))
    assert model.config.px_per_latent == 32
    images = torch.randn(1, 3, 64, 96)
    assert model.encode(images).shape == (1, 32, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert out.shape == images.shape
    out.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_text_after_a_token_and_padding_do_not_matter():
    model = made(Gemma2Encoder(TINY_GEMMA))
    ids = torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    short = model(ids[:, :5], torch.ones(1, 5))
    padded = model(ids, (torch.arange(9) < 5)[None])
    torch.testing.assert_close(padded[:, :5], short, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sliding_window_forgets():
    model = made(Gemma2Encoder(dataclasses.replace(TINY_GEMMA, num_hidden_layers=1)))
    ids = torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 100
    same = (model(ids, torch.ones(1, 9)) == model(other, torch.ones(1, 9))).all(-1)[0]
    assert same.tolist() == [False] * 4 + [True] * 5  # four tokens, itself included


@torch.no_grad()
def test_fused_text_encoder():
    """The same states, in layers with a window of four tokens and without, of a text and of one with padding."""
    model = made(Gemma2Encoder(dataclasses.replace(TINY_GEMMA, num_hidden_layers=3))).double()
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11) < torch.tensor([[11], [6]])).long()
    wanted = model(ids, mask)
    fuse_text(model)
    assert all(layer.self_attn.fused for layer in model.layers)
    torch.testing.assert_close(model(ids, mask)[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=1e-5)


def test_without_a_cap_there_is_no_kernel():
    model = Gemma2Encoder(dataclasses.replace(TINY_GEMMA, attn_logit_softcapping=None))
    fuse_text(model)
    assert not model.fused
    assert not any(layer.self_attn.fused for layer in model.layers)


@pytest.mark.slow
@torch.no_grad()
def test_export_leaves_sizes_free():
    model = made(SanaTransformer2DModel(tiny_transformer_config(interpolation_scale=2.0)))
    picture = {0: BATCH, 2: HEIGHT, 3: WIDTH}
    program = export(model, inputs(model.config)[:4], dynamic_shapes=(picture, {0: BATCH}, {0: BATCH}, {0: BATCH}))
    for batch, height, width in ((1, 1, 1), (3, 5, 9)):
        arguments = inputs(model.config, batch, height, width)[:4]
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(DC_AE, id="full", marks=pytest.mark.slow), pytest.param(DC_AE_LITE, id="lite")])
@torch.no_grad()
def test_decoder_export_leaves_sizes_free(config):
    decoder = made(AutoencoderDC(narrow(config))).decoder
    program = export(decoder, (torch.randn(2, 32, 2, 3),), dynamic_shapes=({0: BATCH, 2: HEIGHT, 3: WIDTH},))
    for shape in ((1, 32, 1, 1), (3, 32, 3, 2)):
        latents = torch.randn(shape)
        torch.testing.assert_close(program.module()(latents), decoder(latents))


@pytest.mark.slow
@torch.no_grad()
def test_text_encoder_export_leaves_length_free():
    model = made(Gemma2Encoder(TINY_GEMMA))
    both = {0: BATCH, 1: Dim("length", max=1024)}
    program = export(model, (torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)), dynamic_shapes=(both, both))
    for shape in ((1, 1), (3, 20)):
        arguments = torch.randint(0, 100, shape), torch.ones(shape, dtype=torch.long)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_models_are_complete_when_built_without_memory():
    """No buffers: what a state dict assigns is all there is."""
    with torch.device("meta"):
        models = (
            SanaTransformer2DModel(tiny_transformer_config(interpolation_scale=1.0)),
            AutoencoderDC(narrow(DC_AE)),
            Gemma2Encoder(TINY_GEMMA),
        )
    assert all(not list(model.buffers()) for model in models)
