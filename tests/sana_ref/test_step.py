"""The exported modules: what the step computes, which tokens are kept, and that nothing in them waits for the host."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny_checkpoint import TEXT_CHANNELS, TEXT_ENCODER, TRANSFORMER, VAE, randomised
from torch.export import Dim, export

from engines.errors import SpecError
from runtime.schedule import apply_row, make_schedule
from sana_ref.autoencoder import AutoencoderDC, average_channels, repeat_channels
from sana_ref.components import DecoderForExport, TextEncoderForExport, select_tokens
from sana_ref.step import GUIDANCE_INPUTS, INPUTS, DenoiserStep, guidance_weights
from sana_ref.text_encoder import Gemma2Encoder
from sana_ref.text_projection import TextProjection, is_text_parameter
from sana_ref.transformer import SanaTransformer2DModel

SPRINT = replace(TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")
BATCH, LENGTH = 2, 6
# More than export and a CUDA graph can hold: reading a value on the host, or a shape that depends on one.
HOST_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


def step_of(config, dtype=torch.float32):
    return DenoiserStep(randomised(SanaTransformer2DModel(config), 0).to(dtype)).eval()


@torch.no_grad()
def embedded_arguments(step, num_texts, seed=1):
    """Of a step, with the prompt's embeddings in place of the keys and values."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    out = [normal(BATCH, 32, 3, 4), normal(BATCH, 32, 3, 4), torch.tensor([500.0, 1, 0.9, -0.1, 0.2, 0.3, 1, -0.5])]
    out += [guidance_weights(4.5, embedded=num_texts == 1), normal(num_texts, BATCH, LENGTH, TEXT_CHANNELS)]
    mask = torch.ones(num_texts, BATCH, LENGTH)
    mask[:, :, 4:] = 0
    out.append(mask)
    if step.transformer.config.guidance_embeds:
        out += [torch.tensor([4.5]), normal(BATCH, 32, 3, 4)]
    return out


@torch.no_grad()
def arguments(step, num_texts, seed=1):
    given_ = embedded_arguments(step, num_texts, seed)
    return [*given_[:4], *TextProjection(step.transformer)(given_[4]), *given_[5:]]


@torch.no_grad()
def test_guidance_is_classifier_free():
    step = step_of(TRANSFORMER)
    latents, previous, row, _, embeds, mask = embedded_arguments(step, 2)
    uncond, cond = (step.transformer(latents, embeds[k], row[:1].expand(BATCH), mask[k]) for k in (0, 1))
    velocity = uncond + 4.5 * (cond - uncond)
    got = step(*arguments(step, 2))
    torch.testing.assert_close(got, apply_row(row.numpy(), latents, velocity, previous, 0 * latents), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embedded_guidance_is_scaled_and_noise_is_added():
    step = step_of(SPRINT)
    assert step.input_names == INPUTS + GUIDANCE_INPUTS
    latents, previous, row, _, embeds, mask, _, noise = embedded_arguments(step, 1)
    velocity = step.transformer(latents, embeds[0], row[:1].expand(BATCH), mask[0], torch.full((BATCH,), 0.45))
    got = step(*arguments(step, 1))
    torch.testing.assert_close(got, apply_row(row.numpy(), latents, velocity, previous, noise), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [TRANSFORMER, SPRINT], ids=["sana", "sprint"])
@torch.no_grad()
def test_keys_and_values_made_once_change_no_bit(config, dtype):
    """Of the transformer: forward makes them in each block."""
    step = step_of(config, dtype)
    _, _, row, _, embeds, mask, *_ = embedded_arguments(step, 1)
    latents = torch.randn(BATCH, 32, 3, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    keys, values = TextProjection(step.transformer)(embeds)
    heads = (config.num_cross_attention_heads, LENGTH, config.cross_attention_head_dim)
    assert keys.shape == values.shape == (config.num_layers, 1, BATCH, *heads)
    assert keys.dtype == values.dtype == dtype
    assert keys.is_contiguous()
    assert values.is_contiguous()
    texts = list(zip(keys[:, 0], values[:, 0], strict=True))
    guidance = torch.full((BATCH,), 0.45) if config.guidance_embeds else None
    got = step.transformer.denoise(latents, texts, row[:1].expand(BATCH), mask[0], guidance)
    expected = step.transformer(latents, embeds[0].to(dtype), row[:1].expand(BATCH), mask[0], guidance)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_each_parameter_is_read_by_one_of_both_parts():
    step = step_of(SPRINT)

    def read(*outputs):
        """What their gradient reaches."""
        step.zero_grad(set_to_none=True)
        torch.stack([output.sum() for output in outputs]).sum().backward()
        return {name for name, parameter in step.named_parameters() if parameter.grad is not None}

    names = {name for name, _ in step.named_parameters()}
    text = {name for name in names if is_text_parameter(name)}
    assert read(*TextProjection(step.transformer)(embedded_arguments(step, 1)[4])) == text
    assert read(*step(*arguments(step, 1))) == names - text


@pytest.mark.parametrize("scheduler", ["flow_euler", "flow_dpm_solver"])
@torch.no_grad()
def test_last_step_returns_its_prediction(scheduler):
    step = step_of(TRANSFORMER)
    latents, previous, _, *others = arguments(step, 2)
    row = torch.from_numpy(make_schedule(scheduler, 5).table[-1].copy())
    after, prediction = step(latents, previous, row, *others)
    torch.testing.assert_close(after, prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_only_the_network_is_narrow(dtype):
    step = step_of(TRANSFORMER, dtype)
    latents, previous, _, *others = arguments(step, 2)
    still = torch.tensor([500.0, 1, 1, 0, 0, 0, 1, 0])  # keep x and ignore the velocity: nothing may be rounded on the way
    after, prediction = step(latents, previous, still, *others)
    assert after.dtype == prediction.dtype == torch.float32
    torch.testing.assert_close(after, latents, rtol=0, atol=0)
    torch.testing.assert_close(prediction, latents, rtol=0, atol=0)


def test_step_of_a_model_that_returns_something_else():
    with pytest.raises(SpecError, match="out_channels: got 64; expected in_channels 32"):
        DenoiserStep(SanaTransformer2DModel(replace(TRANSFORMER, out_channels=64)))


@given(st.floats(0, 100), st.booleans())
def test_guidance_weights_keep_what_both_texts_agree_on(guidance, embedded):
    weights = guidance_weights(guidance, embedded=embedded)
    assert weights.sum().item() == pytest.approx(1, abs=1e-4)
    assert len(weights) == (1 if embedded or guidance <= 1 else 2)


@given(st.integers(2, 12), st.integers(0, 12))
@settings(deadline=None)
def test_kept_tokens_are_the_first_and_the_last(length, more):
    positions = torch.arange(length + more)[None]
    kept = select_tokens(positions, length)[0].tolist()
    assert kept == [0, *range(more + 1, length + more)]


@given(st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None)
def test_shortcuts_undo_each_other(channels, times):
    x = torch.randn(2, channels, 3, 2)
    repeated = repeat_channels(x, times)
    torch.testing.assert_close(repeated, x.repeat_interleave(times, dim=1))
    torch.testing.assert_close(average_channels(repeated, times), x)


@torch.no_grad()
def test_decoder_undoes_the_scaling():
    vae = randomised(AutoencoderDC(VAE), 0).eval()
    latents = torch.randn(1, 32, 2, 2)
    torch.testing.assert_close(DecoderForExport(vae)(latents * VAE.scaling_factor), vae.decode(latents), atol=1e-4, rtol=1e-4)


def test_text_needs_two_tokens():
    with pytest.raises(SpecError, match="max_sequence_length: got 1"):
        TextEncoderForExport(Gemma2Encoder(TEXT_ENCODER), 1)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sprint", "decoder")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["denoiser", "text_encoder", "text_projection", *SLOW])
@torch.no_grad()
def test_exported_graph_never_waits_for_the_host(kind):
    batch, height, width = Dim("batch", max=64), Dim("height", max=128), Dim("width", max=128)
    picture = {0: batch, 2: height, 3: width}
    if kind in ("denoiser", "sprint"):
        module = step_of(SPRINT if kind == "sprint" else TRANSFORMER)
        given_ = tuple(arguments(module, 1 if kind == "sprint" else 2))
        shapes = (picture, picture, None, None, {2: batch}, {2: batch}, {1: batch}, None, picture)[: len(given_)]
    elif kind == "text_projection":
        step = step_of(TRANSFORMER)
        module, given_, shapes = TextProjection(step.transformer), (embedded_arguments(step, 2)[4],), ({1: batch},)
    elif kind == "text_encoder":
        module = TextEncoderForExport(Gemma2Encoder(TEXT_ENCODER), LENGTH).eval()
        given_ = (torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long))
        shapes = ({0: batch, 1: Dim("length", min=LENGTH, max=1024)},) * 2
    else:
        module, given_, shapes = DecoderForExport(AutoencoderDC(VAE)).eval(), (torch.randn(2, 32, 2, 3),), (picture,)
    program = export(module, given_, dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if any(name in target for name in HOST_DEPENDENT)]
    assert not program.constants  # nor is anything copied to the device
    torch.testing.assert_close(program.module()(*given_), module(*given_))
