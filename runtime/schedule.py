"""A schedule is a table: what the denoiser graph must multiply with at every step.

Every sampler here is linear in the latents, the network's velocity, the previous step's prediction and fresh noise. So one row of
eight numbers says all about a step, the same loop runs every sampler, and the row can be an input of a compiled graph:

    v               = sum over k of weights[k] * network(c_in * x, timestep, text[k])
    next latents    = c_x x + c_v v + c_previous previous + c_noise noise
    prediction (x0) = p_x x + p_v v                          `previous` of the next step

Convention (flow matching): x = (1 - sigma) x0 + sigma noise, v = noise - x0, sigma falls from 1 to 0, x0 = x - sigma v. For every
sampler the latents start as standard normal noise and end as x0 in the decoder's scale. Numbers are float64 until they enter the
table, except that sigmas are rounded to float32 first, as diffusers does, because the network's states are made with those.

  flow_euler       x + (s' - s) v
  flow_dpm_solver  DPM-Solver++ 2M, midpoint, first order at both ends. For a flow its first order *is* Euler, and the second adds
                   a multiple of (previous - x0): see `_dpm_solver`
  scm              TrigFlow steps of Sana-Sprint. diffusers keeps latents scaled by sigma_data = 0.5 and divides at the end; in the
                   scale used here sigma_data cancels: x_flow = r x, x0 = x_flow - s v, next = cos(t') x0 + sin(t') noise

Sources: Lu et al., arXiv:2211.01095 (DPM-Solver++); Esser et al., arXiv:2403.03206 (shift); Karras et al., arXiv:2206.00364, eq. 5
(spacing); Chen et al., arXiv:2503.09641 (Sana-Sprint).
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from engines.errors import RequestError, SpecError

__all__ = [
    "COEFFICIENTS",
    "MAX_STEPS",
    "SCHEDULERS",
    "SPACINGS",
    "Recipe",
    "Schedule",
    "SchedulerName",
    "apply_row",
    "load_schedule",
    "make_schedule",
]

SchedulerName = Literal["flow_euler", "flow_dpm_solver", "scm"]
SpacingName = Literal["linear", "exponential", "karras"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
SPACINGS: tuple[SpacingName, ...] = get_args(SpacingName)

# The columns of a table, in order.
COEFFICIENTS = ("timestep", "c_in", "c_x", "c_v", "c_previous", "c_noise", "p_x", "p_v")

MAX_STEPS = 1000  # the models know 1000 noise levels
NUM_TRAIN_TIMESTEPS = 1000
MAX_TIMESTEP = 1.57080  # radians; Sprint's published start, a little above pi / 2
INTERMEDIATE_TIMESTEP = 1.3  # radians; Sprint's published middle of two steps
_KARRAS_RHO = 7.0

F64 = NDArray[np.float64]
Array: TypeAlias = Any  # NumPy or torch: apply_row only adds and multiplies


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a schedule was computed from: make_schedule's arguments, so that it can be written down and computed again."""

    scheduler: SchedulerName
    num_steps: int
    flow_shift: float = 3.0
    spacing: str | tuple[float, ...] = "linear"
    timestep_scale: float = 1.0
    max_timestep: float | None = None
    intermediate_timestep: float | None = INTERMEDIATE_TIMESTEP

    def make(self) -> Schedule:
        return make_schedule(**asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """The steps of one sampler. Arrays are float32 and read-only.

    sigmas: (N + 1,), noise levels before each step and after the last (0), falling. timesteps: (N,), as the network is fed them.
    table: (N, 8), columns as in COEFFICIENTS. initial_scale: what standard normal noise is multiplied with to begin; 1 for all.
    """

    recipe: Recipe
    sigmas: NDArray[np.float32]
    timesteps: NDArray[np.float32]
    table: NDArray[np.float32]
    initial_scale: float = 1.0

    @property
    def scheduler(self) -> SchedulerName:
        return self.recipe.scheduler

    @property
    def num_steps(self) -> int:
        return len(self.table)

    def needs_noise(self, step: int) -> bool:
        """Whether step `step` adds fresh noise (stream step + 1 of runtime.noise)."""
        return bool(self.table[step, COEFFICIENTS.index("c_noise")] != 0)


def apply_row(row: NDArray[np.float32], x: Array, v: Array, previous: Array, noise: Array = None) -> tuple[Array, Array]:
    """What the denoiser graph does with one row, for NumPy arrays or torch tensors: the next latents and the prediction."""
    _, _, c_x, c_v, c_previous, c_noise, p_x, p_v = (float(c) for c in row)
    after = c_x * x + c_v * v
    if c_previous:
        after = after + c_previous * previous
    if c_noise:
        after = after + c_noise * noise
    return after, p_x * x + p_v * v


def make_schedule(
    scheduler: str,
    num_steps: int | None = None,
    flow_shift: float = 3.0,
    spacing: str | Sequence[float] = "linear",
    *,
    timestep_scale: float = 1.0,
    max_timestep: float | None = None,
    intermediate_timestep: float | None = INTERMEDIATE_TIMESTEP,
) -> Schedule:
    """The table of a sampler.

    scheduler: one of SCHEDULERS. num_steps: 1 to 1000; may be left out when `spacing` is a list.
    flow_shift: k in s' = k s / (1 + (k - 1) s), above 0; more time at high noise for larger pictures. Not used by scm.
    spacing: "linear" (each sampler's published grid), "exponential" or "karras" (between the ends of the shifted linear grid), or a
    falling list without the final 0: sigmas in (0, 1] before the shift, or for scm times in radians.
    timestep_scale: factor on the flow samplers' timesteps, from the transformer's config.
    max_timestep, intermediate_timestep: radians, scm only: the start (1.57080 unless given) and the middle of exactly two steps
    (None: evenly spaced).
    Raises RequestError for an unknown scheduler or a bad number of steps, SpecError for the rest.
    """
    if scheduler not in SCHEDULERS:
        raise RequestError(f"scheduler: got {scheduler!r}; {_nearest(scheduler, SCHEDULERS)}.")
    custom = None if isinstance(spacing, str) else _custom(spacing, highest=MAX_TIMESTEP if scheduler == "scm" else 1.0)
    steps = _check_steps(num_steps, custom)
    if custom is None and spacing not in SPACINGS:
        raise SpecError(f"spacing: got {spacing!r}; {_nearest(str(spacing), SPACINGS)}, or a falling list of numbers.")
    _check_positive("timestep_scale", timestep_scale)
    recipe = Recipe(
        scheduler=scheduler,
        num_steps=steps,
        flow_shift=float(flow_shift),
        spacing=str(spacing) if custom is None else tuple(custom.tolist()),
        timestep_scale=float(timestep_scale),
        max_timestep=None if max_timestep is None else float(max_timestep),
        intermediate_timestep=None if intermediate_timestep is None else float(intermediate_timestep),
    )
    if scheduler == "scm":
        if custom is None and spacing != "linear":
            raise SpecError(f"spacing: got {spacing!r}; scm takes 'linear' or a list of times in radians.")
    else:
        _check_positive("flow_shift", flow_shift)
    return _computed(recipe)


@functools.lru_cache(maxsize=64)
def _computed(recipe: Recipe) -> Schedule:
    """A server draws with the same few: computing a row takes as long as all else that Python does for a step."""
    custom = None if isinstance(recipe.spacing, str) else np.array(recipe.spacing, np.float64)
    return _scm(recipe, custom) if recipe.scheduler == "scm" else _flow(recipe, custom)


def load_schedule(path: Path | str, *, num_steps: int | None = None) -> Schedule:
    """The schedule that a YAML file describes, with another number of steps if one is given.

    path: of the file, or the name of one in configs/schedule, such as "sana_4k".
    Raises SpecError for a file that is missing or not what the schema says, and what make_schedule raises.
    """
    from runtime.schedule_file import read_schedule_file  # needs PyYAML and pydantic, which a training host may not have

    return read_schedule_file(Path(path), num_steps=num_steps)


def _flow(recipe: Recipe, custom: F64 | None) -> Schedule:
    sigmas = _flow_sigmas(recipe, custom)
    rounded = np.append(sigmas, 0.0).astype(np.float32)
    if np.any(np.diff(rounded) >= 0):
        raise SpecError(
            f"flow_shift {recipe.flow_shift} with {recipe.num_steps} steps: neighbouring noise levels are the same in float32. "
            "Use fewer steps or a flow_shift nearer to 1."
        )
    levels = rounded.astype(np.float64)
    if recipe.scheduler == "flow_euler":
        timesteps = levels[:-1] * NUM_TRAIN_TIMESTEPS
        return _freeze(recipe, rounded, _euler(levels, timesteps * recipe.timestep_scale))
    timesteps = np.trunc(sigmas * NUM_TRAIN_TIMESTEPS)  # diffusers' integer timesteps
    return _freeze(recipe, rounded, _dpm_solver(levels, timesteps * recipe.timestep_scale))


def _flow_sigmas(recipe: Recipe, custom: F64 | None) -> F64:
    steps, shift = recipe.num_steps, recipe.flow_shift

    def shifted(s: F64) -> F64:
        return shift * s / (1.0 + (shift - 1.0) * s)

    if custom is not None:
        return shifted(custom)
    if recipe.scheduler == "flow_dpm_solver":  # the noisiest level is 0.999 shifted, the grid's last point (0) is not a step
        sigmas = shifted(1.0 - np.linspace(1.0, 1.0 / NUM_TRAIN_TIMESTEPS, steps + 1))[:0:-1]
    else:  # diffusers shifts the lowest level (0.001) when the scheduler is made, and again with the whole grid
        lowest = shifted(np.array(1.0 / NUM_TRAIN_TIMESTEPS))
        sigmas = shifted(np.linspace(1.0, float(lowest), steps))
    first, last = sigmas[0], sigmas[-1]
    if recipe.spacing == "exponential":
        sigmas = np.exp(np.linspace(math.log(first), math.log(last), steps))
    elif recipe.spacing == "karras":
        ramp = np.linspace(0.0, 1.0, steps)
        sigmas = (first ** (1 / _KARRAS_RHO) + ramp * (last ** (1 / _KARRAS_RHO) - first ** (1 / _KARRAS_RHO))) ** _KARRAS_RHO
    return sigmas


def _euler(sigmas: F64, timesteps: F64) -> F64:
    s, after = sigmas[:-1], sigmas[1:]
    one, zero = np.ones_like(s), np.zeros_like(s)
    return np.stack([timesteps, one, one, after - s, zero, zero, one, -s], axis=1)


def _dpm_solver(sigmas: F64, timesteps: F64) -> F64:
    """With a = 1 - s, lambda = ln(a / s), h = lambda' - lambda, A = a' (e^-h - 1) = a s'/s - a' = s'/s - 1 (s > s', so A < 0):

    first order   x' = (s'/s) x - A x0                     = x + (s' - s) v, Euler, since x0 = x - s v
    second order  x' = (s'/s) x - A x0 - A/2 (h/h0) (x0 - previous)
                     = x + (s' - s) v + B (previous - x0)  with B = A/2 h/h0, h0 the step before
    The closed form of A keeps 1 - s out of logarithms, where s near 1 would lose its digits.
    """
    table = _euler(sigmas, timesteps)
    levels = [math.inf if s == 0 else -math.inf if s == 1 else math.log((1.0 - s) / s) for s in sigmas]
    for i in range(1, len(table) - 1):  # the first step has no previous prediction, the last ends at s' = 0
        s, after = sigmas[i], sigmas[i + 1]
        h, h_before = levels[i + 1] - levels[i], levels[i] - levels[i - 1]  # h_before is infinite after s = 1: then B = 0
        b = 0.5 * (after / s - 1.0) * (h / h_before)
        table[i, 2:5] = 1.0 - b, (after - s) + b * s, b
    return table


def _scm(recipe: Recipe, custom: F64 | None) -> Schedule:
    max_timestep, middle = recipe.max_timestep, recipe.intermediate_timestep
    if custom is not None:
        if max_timestep is not None:
            raise SpecError(
                f"max_timestep: got {max_timestep} next to a list of times; the list's first time is the start. Leave it out."
            )
        times = np.append(custom, 0.0)
    else:
        start = MAX_TIMESTEP if max_timestep is None else max_timestep
        times = np.linspace(start, 0.0, recipe.num_steps + 1)
        if recipe.num_steps == 2 and middle is not None:
            times[1] = middle
        if not (0 < start <= MAX_TIMESTEP and np.all(np.diff(times) < 0)):
            raise SpecError(
                f"scm times: got max_timestep {start} and intermediate_timestep {middle}; "
                f"expected {MAX_TIMESTEP} >= max_timestep > intermediate_timestep > 0 (radians)."
            )
    t = times.astype(np.float32).astype(np.float64)  # the network saw float32 times
    now, after = t[:-1], t[1:]
    s = np.sin(t) / (np.sin(t) + np.cos(t))  # flow time
    r = 1.0 / (np.sin(now) + np.cos(now))  # = sqrt(s^2 + (1 - s)^2): takes TrigFlow's unit variance to the flow's x
    c_x0, c_noise = np.cos(after), np.sin(after)
    c_x0[-1], c_noise[-1] = 1.0, 0.0  # the last step returns x0
    table = np.stack([s[:-1], r, c_x0 * r, -c_x0 * s[:-1], np.zeros_like(r), c_noise, r, -s[:-1]], axis=1)
    return _freeze(recipe, s.astype(np.float32), table)


def _freeze(recipe: Recipe, sigmas: NDArray[np.float32], table: F64) -> Schedule:
    table_32 = table.astype(np.float32)
    timesteps = table_32[:, 0].copy()
    for array in (sigmas, timesteps, table_32):
        array.flags.writeable = False
    return Schedule(recipe=recipe, sigmas=sigmas, timesteps=timesteps, table=table_32)


def _check_steps(num_steps: int | None, custom: F64 | None) -> int:
    if num_steps is None and custom is not None:
        num_steps = len(custom)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= MAX_STEPS:
        raise RequestError(f"steps: got {num_steps!r}; expected an integer from 1 to {MAX_STEPS}.")
    if custom is not None and num_steps != len(custom):
        raise RequestError(f"steps: got {num_steps}; this schedule's list has {len(custom)} entries. Ask for {len(custom)} steps.")
    return int(num_steps)


def _custom(values: Sequence[float], *, highest: float) -> F64:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise SpecError(f"spacing: got {values!r}; expected a list of numbers.") from None
    if found.ndim != 1 or not 1 <= found.size <= MAX_STEPS:
        raise SpecError(f"spacing: got a list of shape {found.shape}; expected 1 to {MAX_STEPS} numbers.")
    if not (np.all(np.isfinite(found)) and found[0] <= highest and found[-1] > 0 and np.all(np.diff(found) < 0)):
        raise SpecError(
            f"spacing: got {found.tolist()}; expected numbers falling from at most {highest} to above 0 (the final 0 is added)."
        )
    return found


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise SpecError(f"{name}: got {value}; expected a finite number above 0.")


def _nearest(word: object, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.4)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Valid: {', '.join(valid)}"
