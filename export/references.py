"""The references of a build: which inputs each component is judged with, in the order in which they depend on each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.manifest import ScheduleInfo
from engines.spec import ComponentName, Precision, ShapeRange
from export.cases import Arrays, decoder_cases, denoiser_cases, text_cases, text_projection_cases
from export.components import Component
from export.reference import loaded, run_module
from export.stages import Result, Runner, golden_of
from runtime.prompt import PromptTokenizer
from runtime.schedule import Schedule, make_schedule
from sana_ref.checkpoint import Checkpoint

__all__ = ["decoder_inputs", "denoiser_inputs", "make_references", "schedule_info", "text_inputs"]


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


def _keys_values(
    runner: Runner, component: Component, embeds: Mapping[str, NDArray[np.float32]]
) -> dict[str, dict[str, NDArray[np.floating]]]:
    """What the text projection, in fp32, makes of each text (B, L, C), rounded to numbers that its precision holds.

    In fp16 where that is a 16-bit one: such numbers are in both types, and take half the space.
    """
    dtype = component.dtype
    module = loaded(component.module, runner.loader(component), dtype)
    found: dict[str, dict[str, NDArray[np.floating]]] = {}
    for text, each in embeds.items():
        made = run_module(module, component, {"prompt_embeds": each[None]}, torch.float32)
        narrow = {name: torch.from_numpy(array) for name, array in made.items()}
        if component.precision is not Precision.FP32:
            narrow = {name: tensor.half().to(dtype).half() for name, tensor in narrow.items()}
        found[text] = {name: tensor.numpy() for name, tensor in narrow.items()}
    return found


# The text encoder's reference, its outputs (B, L, C) and the masks (B, L), by text.
Texts = tuple[Result, dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]


def _text_inputs(runner: Runner, ranges: ShapeRange) -> tuple[dict[str, Arrays], dict[str, Any], dict[str, NDArray[np.float32]]]:
    checkpoint = runner.checkpoint
    inputs, masks = text_cases(PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt), ranges.max_batch)
    depends = {"inputs": {case: {k: v.tolist() for k, v in each.items()} for case, each in inputs.items()}}
    return inputs, depends, masks


def text_inputs(runner: Runner, ranges: ShapeRange) -> tuple[dict[str, Arrays], dict[str, Any]]:
    """The cases of the text encoder, and what decides them besides its weights."""
    return _text_inputs(runner, ranges)[:2]


def _texts(runner: Runner, everything: Mapping[ComponentName, Component], ranges: ShapeRange) -> Texts:
    inputs, depends, masks = _text_inputs(runner, ranges)
    reference = runner.reference(everything["text_encoder"], lambda: inputs, depends)
    texts = golden_of(reference)
    return reference, {case: golden.outputs["prompt_embeds"].astype("float32") for case, golden in texts.items()}, masks


def denoiser_inputs(
    runner: Runner, everything: Mapping[ComponentName, Component], ranges: ShapeRange, texts: Texts | None = None
) -> tuple[Callable[[], dict[str, Arrays]], dict[str, Any]]:
    """What makes the cases of the denoiser, and what decides them besides its weights."""
    checkpoint = runner.checkpoint
    text, embeds, masks = texts or _texts(runner, everything, ranges)
    schedule = _schedule(checkpoint)

    def cases() -> dict[str, Arrays]:
        return denoiser_cases(
            _keys_values(runner, everything["text_projection"], embeds),
            masks,
            channels=checkpoint.transformer_config.in_channels,
            ranges=ranges,
            schedule=schedule,
            embedded_guidance=checkpoint.transformer_config.guidance_embeds,
        )

    return cases, {"text": text.key, "ranges": ranges.model_dump(), "schedule": schedule.table.tolist()}


def decoder_inputs(runner: Runner, ranges: ShapeRange) -> tuple[Callable[[], dict[str, Arrays]], dict[str, Any]]:
    """What makes the cases of the decoder, and what decides them besides its weights."""
    channels = runner.checkpoint.vae_config.latent_channels
    return lambda: decoder_cases(channels=channels, ranges=ranges), {"ranges": ranges.model_dump()}


def make_references(
    runner: Runner, everything: Mapping[ComponentName, Component], wanted: Sequence[ComponentName], ranges: ShapeRange
) -> dict[ComponentName, Result]:
    """Run the reference of each wanted component.

    What follows the text encoder is told what its reference says, so the text encoder's comes along with it.
    """
    found: dict[ComponentName, Result] = {}
    if {"text_encoder", "text_projection", "denoiser"} & set(wanted):
        texts = _texts(runner, everything, ranges)
        found["text_encoder"], embeds, _ = texts
        depends: dict[str, Any] = {"text": found["text_encoder"].key}
    if "text_projection" in wanted:
        embedded = runner.checkpoint.transformer_config.guidance_embeds
        depends["embedded_guidance"] = embedded
        found["text_projection"] = runner.reference(
            everything["text_projection"], lambda: text_projection_cases(embeds, embedded_guidance=embedded), depends
        )
    if "denoiser" in wanted:
        found["denoiser"] = runner.reference(everything["denoiser"], *denoiser_inputs(runner, everything, ranges, texts))
    if "decoder" in wanted:
        found["decoder"] = runner.reference(everything["decoder"], *decoder_inputs(runner, ranges))
    return found
