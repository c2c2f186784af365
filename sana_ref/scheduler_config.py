"""What a published scheduler_config.json says, as one of this project's samplers. What none of them can do is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import CheckpointError
from runtime.schedule import SchedulerName

__all__ = ["Sampler", "read_sampler"]

# Class to our name, the key of its shift, and what else must be so: key to (required value, value that the class takes by default).
SUPPORTED: dict[str, tuple[SchedulerName, str | None, dict[str, tuple[Any, Any]]]] = {
    "FlowMatchEulerDiscreteScheduler": (
        "flow_euler",
        "shift",
        {
            "num_train_timesteps": (1000, 1000),
            "use_dynamic_shifting": (False, False),
            "invert_sigmas": (False, False),
            "shift_terminal": (None, None),
            "use_karras_sigmas": (False, False),
            "use_exponential_sigmas": (False, False),
            "use_beta_sigmas": (False, False),
            "stochastic_sampling": (False, False),
        },
    ),
    "DPMSolverMultistepScheduler": (
        "flow_dpm_solver",
        "flow_shift",
        {
            "num_train_timesteps": (1000, 1000),
            "prediction_type": ("flow_prediction", "epsilon"),
            "use_flow_sigmas": (True, False),
            "algorithm_type": ("dpmsolver++", "dpmsolver++"),
            "solver_order": (2, 2),
            "solver_type": ("midpoint", "midpoint"),
            "final_sigmas_type": ("zero", "zero"),
            "thresholding": (False, False),
            "use_karras_sigmas": (False, False),
            "use_exponential_sigmas": (False, False),
            "use_beta_sigmas": (False, False),
            "use_lu_lambdas": (False, False),
            "use_dynamic_shifting": (False, False),
        },
    ),
    "SCMScheduler": ("scm", None, {"prediction_type": ("trigflow", "trigflow")}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a checkpoint samples unless told otherwise."""

    scheduler: SchedulerName
    flow_shift: float  # scm does not read it
    num_steps: int
    guidance_scale: float


def read_sampler(config: Mapping[str, Any], index: Mapping[str, Any]) -> Sampler:
    """The sampler of a parsed scheduler_config.json.

    index: the parsed model_index.json, which may have "num_inference_steps" and "guidance_scale"; else 20 steps (scm: 2) and 4.5.
    Raises CheckpointError for a scheduler that would draw other pictures here, and for numbers that are none.
    """
    kind = config.get("_class_name")
    if kind not in SUPPORTED:
        raise CheckpointError(f"scheduler _class_name: got {kind!r}; expected one of {', '.join(SUPPORTED)}.")
    scheduler, shift_key, required = SUPPORTED[kind]
    for key, (expected, default) in required.items():
        value = config.get(key, default)
        if value != expected:
            raise CheckpointError(
                f"{kind} {key}: got {value!r}; expected {expected!r}, as the published models have. "
                "This project's samplers do not do that; change scheduler_config.json."
            )
    num_steps = index.get("num_inference_steps", 2 if scheduler == "scm" else 20)
    guidance_scale = index.get("guidance_scale", 4.5)
    shift = config.get(shift_key, 1.0) if shift_key else 1.0
    if not isinstance(num_steps, int) or not isinstance(guidance_scale, int | float) or not isinstance(shift, int | float):
        raise CheckpointError(
            f"num_inference_steps, guidance_scale, {shift_key}: got {num_steps!r}, {guidance_scale!r}, {shift!r}; expected numbers."
        )
    return Sampler(scheduler=scheduler, flow_shift=float(shift), num_steps=num_steps, guidance_scale=float(guidance_scale))
