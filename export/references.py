"""The references of a build: which inputs each component is judged with, in the order in which they depend on each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from engines.manifest import ScheduleInfo
from engines.spec import ComponentName, ShapeRange
from export.cases import decoder_cases, denoiser_cases, text_cases
from export.components import Component
from export.stages import Result, Runner, golden_of
from runtime.prompt import PromptTokenizer
from runtime.schedule import Schedule, make_schedule
from sana_ref.checkpoint import Checkpoint

__all__ = ["make_references", "schedule_info"]


def schedule_info(checkpoint: Checkpoint) -> ScheduleInfo:
    """How the model samples unless told otherwise."""
    sampler = checkpoint.sampler
    return ScheduleInfo(
        scheduler=sampler.scheduler,
        flow_shift=sampler.flow_shift,
        num_inference_steps=sampler.num_steps,
        guidance_scale=sampler.guidance_scale,
        timestep_scale=checkpoint.transformer_config.timestep_scale,
    )


def _schedule(checkpoint: Checkpoint) -> Schedule:
    info = schedule_info(checkpoint)
    return make_schedule(info.scheduler, info.num_inference_steps, flow_shift=info.flow_shift, timestep_scale=info.timestep_scale)


def make_references(
    runner: Runner, everything: Mapping[ComponentName, Component], wanted: Sequence[ComponentName], ranges: ShapeRange
) -> dict[ComponentName, Result]:
    """Run the reference of each wanted component.

    The denoiser is told what the text encoder's reference says, so the text encoder's comes along with it.
    """
    checkpoint = runner.checkpoint
    found: dict[ComponentName, Result] = {}
    if {"text_encoder", "denoiser"} & set(wanted):
        inputs, masks = text_cases(PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt), ranges.max_batch)
        depends: dict[str, Any] = {"inputs": {case: {k: v.tolist() for k, v in each.items()} for case, each in inputs.items()}}
        found["text_encoder"] = runner.reference(everything["text_encoder"], inputs, depends)
    if "denoiser" in wanted:
        texts = golden_of(found["text_encoder"])
        schedule = _schedule(checkpoint)
        cases = denoiser_cases(
            {case: golden.outputs["prompt_embeds"].astype("float32") for case, golden in texts.items()},
            masks,
            channels=checkpoint.transformer_config.in_channels,
            ranges=ranges,
            schedule=schedule,
            embedded_guidance=checkpoint.transformer_config.guidance_embeds,
        )
        depends = {"text": found["text_encoder"].key, "ranges": ranges.model_dump(), "schedule": schedule.table.tolist()}
        found["denoiser"] = runner.reference(everything["denoiser"], cases, depends)
    if "decoder" in wanted:
        cases = decoder_cases(channels=checkpoint.vae_config.latent_channels, ranges=ranges)
        found["decoder"] = runner.reference(everything["decoder"], cases, {"ranges": ranges.model_dump()})
    return found
