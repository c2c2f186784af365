"""Every table against diffusers' scheduler of the same settings: same random velocities, latents compared after every step."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler

from runtime.schedule import Schedule, apply_row, make_schedule

STEPS = (1, 2, 5, 20, 28)
SHIFTS = (1.0, 3.0, 6.0)
SHAPE = (2, 4, 8, 8)
# Relative to the largest latent: four roundings of float32 a step, in which both sides and machines differ; and some at the start.
START, BOUND_A_STEP = 1e-6, 4 * 2.0**-24


def velocities(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(SHAPE, generator=generator) for _ in range(2 * n + 1)]


def assert_same_path(schedule: Schedule, scheduler, vs: list[torch.Tensor]) -> None:
    """Random velocities are harsher than a model's: neighbouring predictions differ by several units."""
    x = theirs = vs.pop() * schedule.initial_scale
    previous = torch.zeros_like(x)
    for i, t in enumerate(scheduler.timesteps):
        v = vs[i]
        x, previous = apply_row(schedule.table[i], x, v, previous)
        theirs = scheduler.step(v, t, theirs, return_dict=False)[0]
        bound = START + BOUND_A_STEP * i
        assert (x - theirs).abs().max() <= bound * theirs.abs().max(), f"step {i} of {schedule.num_steps}"
    torch.testing.assert_close(previous, x, rtol=0, atol=0)  # the last step returns the prediction


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("spacing", ["linear", "karras", "exponential"])
def test_flow_euler(n: int, shift: float, spacing: str) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(
        shift=shift, use_karras_sigmas=spacing == "karras", use_exponential_sigmas=spacing == "exponential"
    )
    theirs.set_timesteps(n)
    ours = make_schedule("flow_euler", n, shift, spacing)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas.numpy(), rtol=3e-7)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=3e-7)
    assert_same_path(ours, theirs, velocities(n))


@pytest.mark.parametrize("shift", SHIFTS)
def test_flow_euler_custom_sigmas(shift: float) -> None:
    sigmas = [1.0, 0.9, 0.5, 0.2]
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=sigmas)
    ours = make_schedule("flow_euler", flow_shift=shift, spacing=sigmas)
    assert_same_path(ours, theirs, velocities(4))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", STEPS)
def test_flow_dpm_solver(n: int, shift: float) -> None:
    theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(n)
    ours = make_schedule("flow_dpm_solver", n, shift)
    np.testing.assert_array_equal(ours.sigmas, theirs.sigmas.numpy())
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert_same_path(ours, theirs, velocities(n))


def sprint_pipeline_steps(n: int, middle: float | None, noises: list[torch.Tensor], vs: list[torch.Tensor]):
    """The arithmetic of diffusers' SanaSprintPipeline around its scheduler, with the network's outputs given.

    Yields what the network is fed (timestep, latents), then latents / sigma_data after the step.
    """
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    scheduler.set_timesteps(n, max_timesteps=1.57080, intermediate_timesteps=middle)
    scheduler.set_begin_index(0)
    latents = noises[0] * 0.5
    for i, t in enumerate(scheduler.timesteps[:-1]):
        s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        r = torch.sqrt(s**2 + (1 - s) ** 2)
        fed = latents / 0.5 * r
        output = ((1 - 2 * s) * fed + (1 - 2 * s + 2 * s**2) * vs[i]) / r * 0.5
        with pytest.MonkeyPatch.context() as patch:  # the scheduler draws its noise itself: hand it ours
            patch.setattr("diffusers.schedulers.scheduling_scm.randn_tensor", lambda *_, i=i, **__: noises[i + 1])
            latents, denoised = scheduler.step(output, t, latents, return_dict=False)
        yield s, fed, (denoised if i == n - 1 else latents) / 0.5, denoised / 0.5


@pytest.mark.parametrize(("n", "middle"), [(1, None), (2, 1.3), (2, None), (4, None)])
def test_scm(n: int, middle: float | None) -> None:
    ours = make_schedule("scm", n, intermediate_timestep=middle)
    noises, vs = velocities(n)[: n + 1], velocities(n + 100)
    x, previous = noises[0] * ours.initial_scale, torch.zeros(SHAPE)
    for i, (s, fed, after, denoised) in enumerate(sprint_pipeline_steps(n, middle, noises, vs)):
        timestep, c_in = ours.table[i, :2]
        assert abs(timestep - s.item()) <= 2e-7
        torch.testing.assert_close(float(c_in) * x, fed, rtol=0, atol=START * fed.abs().max().item())
        x, previous = apply_row(ours.table[i], x, vs[i], previous, noises[i + 1])
        torch.testing.assert_close(x, after, rtol=0, atol=START * after.abs().max().item())
        torch.testing.assert_close(previous, denoised, rtol=0, atol=START * denoised.abs().max().item())
        assert ours.needs_noise(i) == (i < n - 1)
