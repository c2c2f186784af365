"""Properties that hold for every schedule, bad input, and the YAML files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import RequestError, SanaError, SpecError
from runtime.schedule import COEFFICIENTS, SCHEDULERS, Schedule, apply_row, load_schedule, make_schedule

CONFIGS = Path(__file__).parents[2] / "configs" / "schedule"
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


@st.composite
def schedules(draw) -> Schedule:
    scheduler = draw(st.sampled_from(SCHEDULERS))
    n = draw(st.integers(1, 60))
    if scheduler == "scm":
        return make_schedule("scm", n)
    shift = draw(st.floats(0.2, 20))
    spacing = draw(
        st.one_of(
            st.sampled_from(["linear", "karras", "exponential"]),
            st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20, unique_by=lambda s: round(s, 3)).map(lambda s: sorted(s)[::-1]),
        )
    )
    return make_schedule(scheduler, n if isinstance(spacing, str) else None, shift, spacing)


@given(schedules())
def test_sigmas_fall_to_zero(schedule: Schedule) -> None:
    assert np.all(np.diff(schedule.sigmas) < 0)
    assert schedule.sigmas[0] <= 1.00001  # Sprint starts a hair above pi / 2
    assert schedule.sigmas[-1] == 0
    assert np.all(np.isfinite(schedule.table))
    assert schedule.table.shape == (schedule.num_steps, len(COEFFICIENTS))
    assert np.array_equal(schedule.table[:, 0], schedule.timesteps)


@given(schedules(), st.integers(0, 2**32))
def test_last_step_returns_the_prediction(schedule: Schedule, seed: int) -> None:
    x, v, previous, noise = np.random.default_rng(seed).standard_normal((4, 3, 3), np.float32)
    after, prediction = apply_row(schedule.table[-1], x, v, previous, noise)
    assert np.array_equal(after, prediction)


@given(schedules(), st.integers(0, 2**32))
def test_exact_on_a_straight_path(schedule: Schedule, seed: int) -> None:
    """A network that knows x0 and the noise: v = noise - x0. Every sampler must land on x0, and predict it at every step."""
    x0, noise = np.random.default_rng(seed).standard_normal((2, 5), np.float32)
    s = float(schedule.sigmas[0])
    x = ((1 - s) * x0 + s * noise) / schedule.table[0, 1]  # the network is fed c_in x, which lies on the straight path
    previous = np.zeros_like(x)
    for row, sigma in zip(schedule.table, schedule.sigmas, strict=False):
        x, previous = apply_row(row, x, (row[1] * x - x0) / sigma, previous, noise)
        np.testing.assert_allclose(previous, x0, atol=2e-4)
    np.testing.assert_allclose(x, x0, atol=2e-4)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: json.dumps(case["arguments"]))
def test_golden(case: dict) -> None:
    if "error" in case:
        with pytest.raises(SanaError) as caught:
            make_schedule(**case["arguments"])
        assert [type(caught.value).__name__, str(caught.value)] == case["error"]
        return
    made = make_schedule(**case["arguments"])
    np.testing.assert_allclose(made.sigmas, np.float32(case["sigmas"]), rtol=0, atol=1e-7)
    np.testing.assert_allclose(made.table, np.float32(case["table"]), rtol=1e-7, atol=1e-7)


def test_published_timesteps() -> None:
    expected = [999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345, 249, 136]
    assert make_schedule("flow_dpm_solver", 20, 3.0).timesteps.tolist() == expected


def test_timestep_scale_reaches_the_network_alone() -> None:
    plain, scaled = make_schedule("flow_euler", 4), make_schedule("flow_euler", 4, timestep_scale=0.001)
    np.testing.assert_allclose(scaled.timesteps, plain.timesteps * 0.001, rtol=1e-6)
    assert np.array_equal(plain.table[:, 1:], scaled.table[:, 1:])


@given(schedules())
def test_a_recipe_makes_the_same_table(schedule: Schedule) -> None:
    assert schedule.recipe.make().table.tobytes() == schedule.table.tobytes()


def test_dpm_solver_from_pure_noise() -> None:
    """sigma = 1 has no finite log signal-to-noise ratio; the step after it falls back to first order."""
    schedule = make_schedule("flow_dpm_solver", flow_shift=1.0, spacing=[1.0, 0.8, 0.5, 0.2])
    assert schedule.table[:, 4].tolist()[:2] == [0, 0]
    assert schedule.table[2, 4] != 0


def test_frozen() -> None:
    schedule = make_schedule("flow_euler", 3)
    with pytest.raises(ValueError, match="read-only"):
        schedule.table[0, 0] = 1
    with pytest.raises(AttributeError):
        schedule.sigmas = schedule.table  # type: ignore[misc]


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None, True])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(RequestError, match="expected an integer from 1 to 1000"):
        make_schedule("flow_euler", steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 1000])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_step_limits(scheduler: str, steps: int) -> None:
    assert make_schedule(scheduler, steps).num_steps == steps


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'flow_euler'"):
        make_schedule("flow_eular", 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flow_shift": 0.0}, "flow_shift: got 0.0"),
        ({"flow_shift": -3.0}, "flow_shift"),
        ({"flow_shift": float("nan")}, "flow_shift"),
        ({"flow_shift": 1e9}, "the same in float32"),
        ({"timestep_scale": 0.0}, "timestep_scale"),
        ({"spacing": "karas"}, "did you mean 'karras'"),
        ({"num_steps": None, "spacing": []}, "expected 1 to 1000 numbers"),
        ({"num_steps": None, "spacing": [0.5, 0.9]}, "falling from at most 1.0"),
        ({"num_steps": None, "spacing": [1.2, 0.5]}, "falling from at most 1.0"),
        ({"num_steps": None, "spacing": [1.0, 0.0]}, "falling from at most 1.0"),
        ({"num_steps": None, "spacing": [1.0, float("nan")]}, "falling from at most 1.0"),
        ({"num_steps": None, "spacing": [1.0, "half"]}, "expected a list of numbers"),
        ({"scheduler": "scm", "spacing": "karras"}, "scm takes 'linear'"),
        ({"scheduler": "scm", "num_steps": 2, "intermediate_timestep": 1.6}, "scm times"),
        ({"scheduler": "scm", "max_timestep": 2.0}, "scm times"),
        ({"scheduler": "scm", "num_steps": None, "spacing": [1.5, 1.0], "max_timestep": 1.5}, "first time is the start"),
    ],
)
def test_bad_settings(arguments: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_schedule(**{"scheduler": "flow_euler", "num_steps": 20} | arguments)


def test_list_decides_the_number_of_steps() -> None:
    assert make_schedule("flow_euler", None, 1.0, [1.0, 0.5]).num_steps == 2
    with pytest.raises(RequestError, match="Ask for 2 steps"):
        make_schedule("flow_euler", 3, 1.0, [1.0, 0.5])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_files_load(path: Path) -> None:
    assert load_schedule(path).num_steps >= 1


def test_file_equals_arguments_and_takes_another_number_of_steps() -> None:
    assert np.array_equal(load_schedule(CONFIGS / "sana_4k.yaml").table, make_schedule("flow_dpm_solver", 20, 6.0).table)
    assert load_schedule(CONFIGS / "sana_4k.yaml", num_steps=7).num_steps == 7
    with pytest.raises(RequestError, match="steps: got 0"):
        load_schedule(CONFIGS / "sana_4k.yaml", num_steps=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheduler: flow_euler\nflow_shft: 3.0\n", "unknown key 'flow_shft'; did you mean 'flow_shift'"),
        ("scheduler: flow_euler\n", "steps: got None"),
        ("num_steps: 3\n", "scheduler is missing"),
        ("scheduler: euler\nnum_steps: 3\n", "scheduler: got 'euler'"),
        ("scheduler: flow_euler\nnum_steps: '20'\n", "num_steps: got '20'"),
        ("scheduler: flow_euler\nnum_steps: 3\nflow_shift: -1.0\n", "flow_shift: got -1.0"),
        ("scheduler: flow_euler\nnum_steps: 3\nmax_timestep: 1.5\n", "max_timestep has no meaning for 'flow_euler'"),
        ("scheduler: scm\nnum_steps: 2\nflow_shift: 3.0\n", "flow_shift has no meaning for 'scm'"),
        ("scheduler: flow_euler\nspacing: [0.5, 0.9]\n", "falling from at most 1.0"),
        ("- 1\n- 2\n", "got a list"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not YAML"),
        ("a" * 70000, "a schedule is a few lines"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message.replace("[", r"\[")) as error:
        load_schedule(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_schedule(tmp_path / "none.yaml")
