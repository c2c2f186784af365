"""SanaReference by itself: requests, seeds, precisions. That its numbers are the published pipelines' is in tests/parity."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoint import EULER, INSTRUCTION, MAX_SEQUENCE_LENGTH, SCM, TRANSFORMER, write_checkpoint

from engines.errors import RequestError
from runtime.schedule import make_schedule
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference, component_dtypes

SIZE = {"width": 96, "height": 64}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return SanaReference(write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture(scope="module")
def sprint(tmp_path_factory):
    config = replace(TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return SanaReference(write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sprint", transformer=config, scheduler=SCM))


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def test_a_request_is_repeatable_and_a_seed_belongs_to_a_picture(reference):
    both = pixels(reference.generate(["a", "b"], seed=3, steps=3, **SIZE))
    assert both.shape == (2, 64, 96, 3)
    np.testing.assert_array_equal(both, pixels(reference.generate(["a", "b"], seed=3, steps=3, **SIZE)))
    second = pixels(reference.generate("b", seed=4, steps=3, **SIZE))[0].astype(int)
    assert np.abs(second - both[1].astype(int)).max() <= 1  # another batch size may add up in another order


def test_steps_are_reported(reference):
    seen = []
    reference.generate("a", steps=3, scheduler="flow_euler", on_step=lambda *step: seen.append(step), **SIZE)
    assert [(step, total, tuple(latents.shape)) for step, total, latents in seen] == [(i, 3, (1, 32, 2, 3)) for i in (1, 2, 3)]


def test_text_has_the_shape_of_the_boundary(reference):
    text = reference.encode_text(["a", "b c"], "", 4.5)
    heads = (TRANSFORMER.num_cross_attention_heads, MAX_SEQUENCE_LENGTH, TRANSFORMER.cross_attention_head_dim)
    assert text.keys.shape == text.values.shape == (TRANSFORMER.num_layers, 2, 2, *heads)
    assert text.mask.sum(-1).tolist() == [[1, 1], [3, 5]]  # <bos>; <bos>, the instruction's last token, and the prompt's
    assert text.weights.tolist() == [-3.5, 4.5]
    assert reference.encode_text("a", "", 1.0).weights.tolist() == [1.0]


def test_instruction_reaches_the_prompt_and_not_the_negative_prompt(reference):
    plain = SanaReference(replace(reference.checkpoint, prompt=replace(reference.checkpoint.prompt, complex_human_instruction="")))
    assert not torch.allclose(plain.encode_prompts("a")[0], reference.encode_prompts("a")[0], atol=1e-3)
    torch.testing.assert_close(plain.encode_prompts("a", negative=True), reference.encode_prompts("a", negative=True))
    assert reference.tokenizer.sequence_length() == len("\n".join(INSTRUCTION)) + 1 + MAX_SEQUENCE_LENGTH - 2


def test_guidance_moves_the_picture(reference):
    drawn = [pixels(reference.generate("a", guidance=guidance, steps=2, **SIZE)) for guidance in (1.0, 4.5, 9.0)]
    assert len({picture.tobytes() for picture in drawn}) == 3


def test_sprint_reads_its_guidance_and_its_noise(sprint):
    assert sprint.schedule().num_steps == 2
    assert sprint.encode_text("a", "", 4.5).weights.tolist() == [1.0]
    drawn = [pixels(sprint.generate("a", guidance=guidance, **SIZE)) for guidance in (1.0, 4.5)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 100}, "width: got 100 px; expected a multiple of 32"),
        ({"height": 0}, "height: got 0 px"),
        ({"seed": -1}, "seed: got -1"),
        ({"steps": 0}, "steps: got 0"),
        ({"scheduler": "euler"}, "scheduler: got 'euler'; did you mean 'flow_euler'"),
        ({"scheduler": "scm"}, "scheduler: got 'scm'; this model was trained for 'flow_dpm_solver'"),
        ({"scheduler": make_schedule("flow_euler", 4), "steps": 3}, "steps: got 3 beside a schedule of 4"),
        ({"negative_prompts": ["a", "b"]}, "negative_prompts: got 2; expected 1"),
        ({"prompts": []}, "prompts: got 0"),
    ],
)
def test_bad_requests(reference, arguments, message):
    with pytest.raises(RequestError, match=message):
        reference.generate(**({"prompts": "a"} | SIZE | arguments))


def test_schedule_is_the_checkpoints_unless_another_is_asked_for(tmp_path):
    folder = write_checkpoint(
        tmp_path / "x", scheduler=EULER | {"shift": 6.0}, transformer=replace(TRANSFORMER, timestep_scale=0.5)
    )
    reference = SanaReference(folder)
    np.testing.assert_array_equal(reference.schedule().table, make_schedule("flow_euler", 20, 6.0, timestep_scale=0.5).table)
    own = make_schedule("flow_dpm_solver", spacing=[0.9, 0.5, 0.2])
    np.testing.assert_array_equal(reference.schedule(own).sigmas, own.sigmas)
    assert reference.schedule(own).timesteps[0] == np.float32(own.timesteps[0] * 0.5)
    assert reference.latent_size(None, 64) == (2, 32)


def test_fp16_is_the_transformers_alone():
    assert component_dtypes(torch.float16) == {"transformer": torch.float16, "vae": torch.bfloat16, "text_encoder": torch.bfloat16}
    assert set(component_dtypes(torch.float32).values()) == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_draws_nearly_the_same(reference, dtype):
    half = SanaReference(load(reference.checkpoint.folder), dtype=dtype)
    latents = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(0))
    schedule = reference.schedule(steps=4)
    states = [each.sample(each.encode_text("a", "", 4.5), schedule, latents=latents, guidance=4.5) for each in (reference, half)]
    assert states[1].dtype == torch.float32
    assert (states[0] - states[1]).abs().max() < 16 * torch.finfo(torch.bfloat16).eps * states[0].abs().max()
    assert half.decode(latents).dtype == torch.float32
