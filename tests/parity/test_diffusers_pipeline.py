"""The reference against diffusers' pipelines: one checkpoint folder, the same noise, latents compared after every step."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from tiny_checkpoint import (
    DPM_SOLVER,
    EULER,
    INSTRUCTION,
    MAX_SEQUENCE_LENGTH,
    SCM,
    TRANSFORMER,
    write_checkpoint,
    write_json,
)

from runtime.image import to_images
from runtime.schedule import COEFFICIENTS
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference

BOUND = 1e-5  # fp32, relative to the largest value, after any step
PROMPTS = ["  A Red Apple ", "a blue cup, and to the right of it three green pears"]  # the second does not fit
NEGATIVE = "Blurry"
SPRINT = replace(TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")
WIDTH, HEIGHT = 192, 128  # px


def diffusers_pipeline(folder, kind):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    config = load(folder).scheduler_config
    pipeline = kind(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model.from_pretrained(folder / "text_encoder", attn_implementation="eager"),
        vae=diffusers.AutoencoderDC.from_pretrained(folder / "vae"),
        transformer=diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=getattr(diffusers, config["_class_name"]).from_config(dict(config)),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_theirs(pipeline, latents, **arguments):
    """Latents after every step, and the decoded images (B, 3, H, W), 0 to 1."""
    states = []

    def keep(_pipeline, _step, _timestep, tensors):
        states.append(tensors["latents"].clone())
        return tensors

    images = pipeline(
        prompt=PROMPTS,
        latents=latents,
        width=WIDTH,
        height=HEIGHT,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        use_resolution_binning=False,
        output_type="pt",
        callback_on_step_end=keep,
        **arguments,
    ).images
    return states, images


def assert_close(got, expected, name):
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error < BOUND, f"{name}: relative error {error:.1e}; expected below {BOUND:.0e}"


def noise_like_theirs(seed, batch, channels):
    return torch.randn(batch, channels, HEIGHT // 32, WIDTH // 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # a small step of the timestep must not be lost in rounding, so the published scale of 1 is not the one that is tested
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", transformer=replace(TRANSFORMER, timestep_scale=0.9))


LONG = pytest.param(DPM_SOLVER, 20, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::runtime.prompt.PromptCutWarning")
@pytest.mark.parametrize("instruction", [INSTRUCTION, None], ids=["instruction", "no_instruction"])
@pytest.mark.parametrize(("scheduler", "steps"), [(EULER, 20), LONG, (DPM_SOLVER, 5), (DPM_SOLVER, 1)])
@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_sana_pipeline(folder, scheduler, steps, instruction, guidance):
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    latents = noise_like_theirs(0, 2, 32)
    theirs, their_images = run_theirs(
        diffusers_pipeline(folder, diffusers.SanaPipeline),
        latents,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        complex_human_instruction=instruction,
    )
    checkpoint = load(folder)
    if instruction is None:
        checkpoint = replace(checkpoint, prompt=replace(checkpoint.prompt, complex_human_instruction=""))
    reference = SanaReference(checkpoint)
    ours = []
    out = reference.sample(
        reference.encode_text(PROMPTS, NEGATIVE, guidance),
        reference.schedule(steps=steps),
        latents=latents,
        guidance=guidance,
        on_step=lambda step, total, state: ours.append(state),
    )
    assert len(ours) == len(theirs) == steps
    for i, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(got, expected, f"latents after step {i + 1}")
    pictures = np.stack([np.asarray(picture, np.float32) for picture in to_images(reference.decode(out).numpy())])
    expected_pictures = their_images.permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(pictures - expected_pictures).max() < 0.51  # half a level is the rounding to 8 bits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::runtime.prompt.PromptCutWarning")
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sprint_pipeline(tmp_path, steps):
    folder = write_checkpoint(tmp_path / "sprint", transformer=SPRINT, scheduler=SCM)
    latents = noise_like_theirs(0, 2, 32)
    theirs, their_images = run_theirs(
        diffusers_pipeline(folder, diffusers.SanaSprintPipeline),
        latents,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        guidance_scale=4.5,
        complex_human_instruction=INSTRUCTION,
        generator=torch.Generator().manual_seed(1),
    )
    noise = torch.Generator().manual_seed(1)  # diffusers draws for every step, the last one's is multiplied by sin 0
    fresh = [torch.randn(latents.shape, generator=noise) for _ in range(steps)]
    reference = SanaReference(load(folder))
    ours = []
    out = reference.sample(
        reference.encode_text(PROMPTS, "", 4.5),
        reference.schedule(steps=steps),
        latents=latents,
        guidance=4.5,
        noise=lambda step: fresh[step],
        on_step=lambda step, total, state: ours.append(state),
    )
    for i, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(got, expected / 0.5, f"latents after step {i + 1}")  # theirs are times sigma_data
    pictures = np.stack([np.asarray(picture, np.float32) for picture in to_images(reference.decode(out).numpy())])
    assert np.abs(pictures - their_images.permute(0, 2, 3, 1).numpy() * 255).max() < 0.51
    assert reference.schedule(steps=steps).table[-1, COEFFICIENTS.index("c_noise")] == 0


def test_published_instruction_is_theirs():
    import inspect

    from sana_ref.instruction import COMPLEX_HUMAN_INSTRUCTION, MAX_SEQUENCE_LENGTH

    for pipeline in (diffusers.SanaPipeline, diffusers.SanaSprintPipeline):
        defaults = inspect.signature(pipeline.__call__).parameters
        assert defaults["complex_human_instruction"].default == list(COMPLEX_HUMAN_INSTRUCTION)
        assert defaults["max_sequence_length"].default == MAX_SEQUENCE_LENGTH
