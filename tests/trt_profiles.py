"""Optimization profiles for engines of the fake bundles' graphs."""

from __future__ import annotations

from fakes import CHANNELS, LATENT_CHANNELS, LENGTH

from engines import tensorrt

LOW, OPT, HIGH = (1, 1), (2, 2), (4, 4)  # batch, side in latent cells


def profiles(component: str) -> tensorrt.Profiles:
    def latents(batch: int, side: int) -> tuple[int, ...]:
        return (batch, LATENT_CHANNELS, side, side)

    if component == "text_encoder":
        shapes = [(batch, LENGTH + more) for batch, more in ((1, 0), (1, 4), (4, 16))]
        return {"input_ids": tuple(shapes), "attention_mask": tuple(shapes)}  # type: ignore[dict-item]
    texts = [(1, LOW[0]), (2, OPT[0]), (2, HIGH[0])]
    if component == "text_projection":
        return {"prompt_embeds": tuple((k, batch, LENGTH, CHANNELS) for k, batch in texts)}  # type: ignore[dict-item]
    found = {"latents": tuple(latents(*size) for size in (LOW, OPT, HIGH))}
    if component == "denoiser":
        found["previous"] = found["latents"]
        found["guidance_weights"] = ((1,), (2,), (2,))
        found["text_keys"] = found["text_values"] = tuple((1, k, batch, 1, LENGTH, CHANNELS) for k, batch in texts)
        found["prompt_mask"] = tuple((k, batch, LENGTH) for k, batch in texts)
    return found  # type: ignore[return-value]
