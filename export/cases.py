"""Inputs for the parity check: seeded noise, rows of a real schedule, and real prompts through the model's own tokenizer.

Two or three cases a component. Together they cover both numbers of texts (with guidance and without), one image and several, early
and late steps, the smallest size and one that is not square. Sizes are the smallest that the engine serves: errors do not grow with
the picture, time does.
"""

import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engines.spec import PX_PER_LATENT, ShapeRange
from runtime.noise import normal_batch
from runtime.prompt import PromptCutWarning, PromptTokenizer
from runtime.schedule import Schedule

__all__ = ["Arrays", "decoder_cases", "denoiser_cases", "text_cases", "text_projection_cases"]

Arrays = dict[str, NDArray[np.generic]]

PROMPTS = ("a red apple on a yellow background", "Two cats under a blue umbrella, seen from above, soft evening light")
NEGATIVE_PROMPTS = ("", "blurry, low quality")
GUIDANCE = 4.5
_TEXT_TOKENS = 16  # of a text projection's case: keys and values of all 300 would be larger than a small model
_SEED = 20241010  # any; noise streams apart from those of pictures are not needed, the bundle keeps the arrays


def text_cases(tokenizer: PromptTokenizer, max_batch: int) -> tuple[dict[str, Arrays], dict[str, NDArray[np.float32]]]:
    """Inputs of the text encoder for the cases "prompt" and "negative", and the masks (B, L) that the denoiser sees with them."""
    batch = min(2, max_batch)
    inputs: dict[str, Arrays] = {}
    masks = {}
    for case, prompts, negative in (("prompt", PROMPTS, False), ("negative", NEGATIVE_PROMPTS, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCutWarning)  # of a model that reads a few tokens; what is left is still a prompt
            tokens = tokenizer.encode(prompts[:batch], negative=negative)
        inputs[case] = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        masks[case] = tokens.selected_mask
    return inputs, masks


def text_projection_cases(embeds: Mapping[str, NDArray[np.float32]], *, embedded_guidance: bool) -> dict[str, Arrays]:
    """Inputs of the text projection: the first tokens of both texts, and the last of one, which are padding. embeds: (B, L, C).

    embedded_guidance: a model that has one text an image, the prompt.
    """
    prompt = embeds["prompt"][None]
    texts = prompt if embedded_guidance else np.stack([embeds["negative"], embeds["prompt"]])
    return {"guided": {"prompt_embeds": texts[:, :, :_TEXT_TOKENS]}, "alone": {"prompt_embeds": prompt[:, :1, -_TEXT_TOKENS:]}}


def _sizes(ranges: ShapeRange) -> dict[str, tuple[int, int, int]]:
    """Case: images, latent rows, latent columns."""
    least, most = ranges.min_side // PX_PER_LATENT, ranges.max_side // PX_PER_LATENT
    return {"square": (1, least, least), "wide": (min(2, ranges.max_batch), least, min(most, least + max(1, least // 2)))}


def denoiser_cases(
    keys_values: Mapping[str, Mapping[str, NDArray[np.floating]]],
    masks: Mapping[str, NDArray[np.float32]],
    *,
    channels: int,
    ranges: ShapeRange,
    schedule: Schedule,
    embedded_guidance: bool,
) -> dict[str, Arrays]:
    """Inputs of the step: first and last row with guidance, a middle one without. `masks` as of text_cases.

    keys_values: text_keys and text_values (blocks, 1, B, H, L, head_dim) of the texts "prompt" and "negative".

    Three rows, because an error in the time's sinusoid is the same for all tokens of a case: one alone could look like a bias.
    """
    cases = {}
    sizes = _sizes(ranges)
    for case, row, (batch, height, width) in (
        ("square", 0, sizes["square"]),
        ("wide", schedule.num_steps // 2, sizes["wide"]),
        ("last", schedule.num_steps - 1, sizes["square"]),
    ):
        guided = case != "wide" and not embedded_guidance
        texts = ("negative", "prompt") if guided else ("prompt",)
        seeds = [_SEED + row + i for i in range(batch)]
        shape = (channels, height, width)
        inputs: Arrays = {
            "latents": normal_batch(seeds, shape, stream=0),
            "previous": normal_batch(seeds, shape, stream=1),
            "coefficients": np.array(schedule.table[row]),
            "guidance_weights": np.array([1 - GUIDANCE, GUIDANCE] if guided else [1.0], np.float32),
            **{
                name: np.concatenate([keys_values[text][name][:, :, :batch] for text in texts], axis=1)
                for name in ("text_keys", "text_values")
            },
            "prompt_mask": np.stack([masks[text][:batch] for text in texts]),
        }
        if embedded_guidance:
            inputs["guidance_scale"] = np.array([GUIDANCE], np.float32)
            inputs["noise"] = normal_batch(seeds, shape, stream=2)
        cases[case] = inputs
    return cases


def decoder_cases(*, channels: int, ranges: ShapeRange) -> dict[str, Arrays]:
    """Inputs of the decoder. Latents as the sampler leaves them have a standard deviation near 1."""
    return {
        case: {"latents": normal_batch([_SEED + i for i in range(batch)], (channels, height, width), stream=3)}
        for case, (batch, height, width) in _sizes(ranges).items()
    }
