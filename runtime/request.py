"""A request for pictures, checked against what the bundle can do. Messages say what was got, what was expected, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Manifest
from engines.errors import RequestError
from engines.spec import PX_PER_LATENT
from runtime.noise import MAX_SEED, check_seed
from runtime.prompt import check_prompts
from runtime.schedule import INTERMEDIATE_TIMESTEP, SCHEDULERS, Recipe, Schedule

__all__ = ["MAX_GUIDANCE", "Request", "check_request"]

MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """As many pictures as prompts."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]  # one for each prompt
    seeds: tuple[int, ...]  # one for each prompt
    guidance: float
    width: int  # px
    height: int  # px
    schedule: Schedule
    guidance_embeds: bool  # the network takes the scale itself, so that one text is enough

    @property
    def guidance_weights(self) -> NDArray[np.float32]:
        """(k,): what the velocities of negative prompt and prompt are multiplied with before they are added."""
        if self.guidance_embeds or self.guidance <= 1:
            return np.ones(1, np.float32)
        return np.array([1 - self.guidance, self.guidance], np.float32)


def check_request(
    manifest: Manifest,
    *,
    prompts: object,
    negative_prompts: object = "",
    seed: object = 0,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    scheduler: str | Schedule | None = None,
) -> Request:
    """The arguments of SanaEngine.generate, with what was left out taken from the bundle. Raises RequestError."""
    texts = check_prompts(prompts)
    guidance = _check_guidance(manifest.schedule.guidance_scale if guidance is None else guidance)
    request = Request(
        prompts=tuple(texts),
        negative_prompts=_check_negative(negative_prompts, len(texts)),
        seeds=_check_seeds(seed, len(texts)),
        guidance=guidance,
        width=_check_side("width", width, manifest),
        height=_check_side("height", height, manifest),
        schedule=_check_schedule(scheduler, steps, manifest),
        guidance_embeds=manifest.guidance_embeds,
    )
    if len(request.guidance_weights) == 1 and any(text.strip() for text in request.negative_prompts):
        why = "this model has no negative prompts" if manifest.guidance_embeds else f"guidance {guidance} does not use them"
        remedy = "Leave them out." if manifest.guidance_embeds else "Raise guidance above 1, or leave them out."
        raise RequestError(f"negative_prompts: got {request.negative_prompts[0]!r}, and {why}. {remedy}")
    return request


def _check_negative(negative_prompts: object, count: int) -> tuple[str, ...]:
    found = check_prompts(negative_prompts, name="negative_prompts")
    if isinstance(negative_prompts, str):
        return tuple(found * count)
    if len(found) != count:
        raise RequestError(f"negative_prompts: got {len(found)}; expected {count}, one for each prompt, or one string for all.")
    return tuple(found)


def _check_seeds(seed: object, count: int) -> tuple[int, ...]:
    if isinstance(seed, list | tuple | np.ndarray):
        if len(seed) != count:
            raise RequestError(f"seed: got a list of {len(seed)}; expected {count}, one for each prompt, or one integer.")
        return tuple(check_seed(each) for each in seed)
    first = check_seed(seed)
    if first + count - 1 > MAX_SEED:
        raise RequestError(
            f"seed: got {first} for {count} prompts, which get {first}, {first} + 1, …; expected at most {MAX_SEED}."
        )
    return tuple(range(first, first + count))


def _check_guidance(guidance: object) -> float:
    if isinstance(guidance, bool) or not isinstance(guidance, int | float | np.integer | np.floating):
        raise RequestError(f"guidance: got {guidance!r}; expected a number from 0 to {MAX_GUIDANCE:g} (1 and below: no guidance).")
    if not (math.isfinite(guidance) and 0 <= guidance <= MAX_GUIDANCE):
        raise RequestError(f"guidance: got {guidance}; expected 0 to {MAX_GUIDANCE:g} (1 and below: no guidance).")
    return float(guidance)


def _check_side(name: str, value: object, manifest: Manifest) -> int:
    low, high = manifest.ranges.min_side, manifest.ranges.max_side
    if value is None:
        return manifest.ranges.opt_side
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{name}: got {value!r}; expected an integer, in px, from {low} to {high}.")
    side = int(value)
    if not low <= side <= high:
        raise RequestError(
            f"{name}: got {side} px; this bundle draws {low} to {high} px. Use {min(max(side, low), high)}, "
            "or rebuild with another range of sizes."
        )
    if side % PX_PER_LATENT:
        below = side - side % PX_PER_LATENT
        near = [str(each) for each in (below, below + PX_PER_LATENT) if low <= each <= high]
        raise RequestError(f"{name}: got {side} px; expected a multiple of {PX_PER_LATENT}. Use {' or '.join(near)}.")
    return side


def _check_schedule(scheduler: object, steps: int | None, manifest: Manifest) -> Schedule:
    info = manifest.schedule
    if isinstance(scheduler, Schedule):
        recipe = scheduler.recipe
        if steps is not None and steps != recipe.num_steps:
            raise RequestError(f"steps: got {steps} beside a schedule of {recipe.num_steps} steps. Leave steps out.")
    else:
        name: Any = info.scheduler if scheduler is None else scheduler
        recipe = Recipe(
            scheduler=name,
            num_steps=info.num_inference_steps if steps is None else steps,
            flow_shift=info.flow_shift,
            max_timestep=info.max_timestep,
            intermediate_timestep=info.intermediate_timestep or INTERMEDIATE_TIMESTEP,
        )
    schedule = replace(recipe, timestep_scale=info.timestep_scale).make()
    if (schedule.scheduler == "scm") != (info.scheduler == "scm"):
        usable = _usable(info.scheduler)
        raise RequestError(
            f"scheduler: got {schedule.scheduler!r}; this model was trained for {info.scheduler!r}. Use {' or '.join(usable)}."
        )
    return schedule


def _usable(trained_for: str) -> Sequence[str]:
    return [name for name in SCHEDULERS if (name == "scm") == (trained_for == "scm")]
