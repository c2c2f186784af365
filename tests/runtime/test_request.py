"""Every argument of generate(), out of range and of the wrong kind: the message says what was got, expected, and what to do."""

import pytest
from fakes import fake_info

from engines.bundle import FileEntry, Manifest, ScheduleInfo
from engines.errors import RequestError
from engines.spec import COMPONENTS
from runtime.noise import MAX_SEED
from runtime.request import check_request
from runtime.schedule import make_schedule


def manifest(**changes: object) -> Manifest:
    files = {f"{component}/model.onnx": FileEntry(sha256="0" * 64, size=1, role="graph") for component in COMPONENTS}
    return Manifest(**fake_info(**changes).model_dump(), files=files)


SPRINT = {"schedule": ScheduleInfo(scheduler="scm", num_inference_steps=2, guidance_scale=4.5), "guidance_embeds": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": 3}, "prompts: got int"),
        ({"prompts": []}, "prompts: got 0"),
        ({"prompts": ["a", None]}, r"prompts\[1\]: got NoneType"),
        ({"negative_prompts": 3}, "negative_prompts: got int"),
        ({"negative_prompts": ["a", "b"]}, "negative_prompts: got 2; expected 1, one for each prompt"),
        ({"negative_prompts": "blur", "guidance": 1.0}, "guidance 1.0 does not use them. Raise guidance above 1"),
        ({"seed": -1}, "seed: got -1; expected an integer from 0 to 18446744073709551615"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"seed": "7"}, "seed: got '7'"),
        ({"seed": None}, "seed: got None"),
        ({"seed": [1, 2]}, "seed: got a list of 2; expected 1"),
        ({"seed": [True]}, "seed: got True"),
        ({"seed": MAX_SEED, "prompts": ["a", "b"]}, "seed: got 18446744073709551615 for 2 prompts"),
        ({"steps": 0}, "steps: got 0; expected an integer from 1 to 1000"),
        ({"steps": 1001}, "steps: got 1001"),
        ({"steps": 2.0}, "steps: got 2.0"),
        ({"guidance": float("nan")}, "guidance: got nan"),
        ({"guidance": float("inf")}, "guidance: got inf"),
        ({"guidance": -1}, "guidance: got -1; expected 0 to 100"),
        ({"guidance": 101}, "guidance: got 101"),
        ({"guidance": "4"}, "guidance: got '4'"),
        ({"guidance": True}, "guidance: got True"),
        ({"width": 100}, "width: got 100 px; expected a multiple of 32. Use 96 or 128"),
        ({"height": 33}, "height: got 33 px; expected a multiple of 32. Use 32 or 64"),
        ({"width": 0}, "width: got 0 px; this bundle draws 32 to 128 px. Use 32"),
        ({"height": -64}, "height: got -64 px"),
        ({"width": 160}, "width: got 160 px; this bundle draws 32 to 128 px. Use 128, or rebuild"),
        ({"width": 64.0}, "width: got 64.0; expected an integer"),
        ({"height": "64"}, "height: got '64'"),
        ({"scheduler": "flow_eular"}, "scheduler: got 'flow_eular'; did you mean 'flow_euler'"),
        ({"scheduler": 3}, "scheduler: got 3"),
        ({"scheduler": "scm"}, "trained for 'flow_euler'. Use flow_euler or flow_dpm_solver"),
        ({"scheduler": make_schedule("flow_euler", 4), "steps": 5}, "steps: got 5 beside a schedule of 4"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(manifest(), **({"prompts": "a cat"} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "flow_euler"}, "trained for 'scm'. Use scm"),
        ({"negative_prompts": "blur"}, "this model has no negative prompts. Leave them out"),
    ],
)
def test_refused_by_sprint(arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(manifest(**SPRINT), prompts="a cat", **arguments)


def test_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="steps"):
        check_request(manifest(), prompts="a cat", steps=0)


def test_sprint_needs_one_text() -> None:
    request = check_request(manifest(**SPRINT), prompts="a cat")
    assert request.guidance_weights.tolist() == [1.0]
    assert request.schedule.sigmas[0] > 1
    assert request.schedule.num_steps == 2


@pytest.mark.parametrize(("guidance", "weights"), [(0, [1]), (1, [1]), (4.5, [-3.5, 4.5])])
def test_guidance_weights(guidance: float, weights: list[float]) -> None:
    assert check_request(manifest(), prompts="", guidance=guidance).guidance_weights.tolist() == weights


def test_model_settings_reach_the_schedule() -> None:
    info = ScheduleInfo(scheduler="flow_euler", flow_shift=5.0, num_inference_steps=7, guidance_scale=2.0, timestep_scale=0.5)
    request = check_request(manifest(schedule=info), prompts="a")
    assert request.guidance == 2.0
    assert request.schedule.recipe.flow_shift == 5.0
    assert request.schedule.timesteps[0] == 500
    given = check_request(manifest(schedule=info), prompts="a", scheduler=make_schedule("flow_dpm_solver", 3, 2.0))
    assert (given.schedule.num_steps, given.schedule.recipe.flow_shift) == (3, 2.0)
    assert given.schedule.recipe.timestep_scale == 0.5  # the model's, whatever the file said
