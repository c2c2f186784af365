"""Pictures while training: the same at every visit, those that the reference draws, and no reason for a run to end."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tiny_checkpoint import TRANSFORMER, write_checkpoint

from engines.errors import CheckpointError
from runtime.noise import normal_batch
from runtime.schedule import make_schedule
from runtime.schedule_file import ScheduleFile
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference
from train.grid import grid
from train.schema import ValidationSettings
from train.trainer.errors import TrainingError
from train.validation import make_validation
from train.validation_page import read_scores

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "sana-tiny"
CPU = torch.device("cpu")
PROMPTS = ("a red cube", "fog")
SCHEDULE = ScheduleFile(scheduler="flow_dpm_solver", num_steps=2, flow_shift=2.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def weights(checkpoint):
    return load(checkpoint).state_dict("transformer")


def settings(model, *, schedule=SCHEDULE, **more):
    """What make_validation reads of an experiment."""
    values = {"prompts": PROMPTS, "side": 32, "seed": 7, "guidance_scale": 3.0, "model": None if model is None else str(model)}
    return SimpleNamespace(
        name="forest & fog",
        validation=ValidationSettings(**values | more),
        schedule=schedule,
        data=SimpleNamespace(resolution=512),
        model=SimpleNamespace(checkpoint=None),
    )


def make(folder, model, config=TRANSFORMER, **more):
    lines = []
    return make_validation(settings(model, **more), config, folder, CPU, lines.append), lines


def size(path):
    with Image.open(path) as image:
        return image.size


def test_pictures_are_the_references(tmp_path, checkpoint, weights):
    validation, _ = make(tmp_path, checkpoint)
    reference = SanaReference(checkpoint)
    latents = reference.sample(
        reference.encode_text(PROMPTS, "", 3.0),
        make_schedule("flow_dpm_solver", 2, 2.5),
        latents=torch.from_numpy(normal_batch([7, 8], (32, 1, 1))),
        guidance=3.0,
    )
    torch.testing.assert_close(validation._draw(weights), reference.decode(latents), rtol=0, atol=2e-5)


def test_a_visit_writes_a_grid_scores_and_a_page(tmp_path, checkpoint, weights):
    validation, lines = make(tmp_path, checkpoint)
    first = validation(1000, weights)
    assert set(first) == {"pictures_mean", "pictures_std", "pictures_saturated"}
    assert 0 < first["pictures_std"]
    folder = tmp_path / "validation"
    assert {path.name for path in folder.iterdir()} == {"step_00001000.png", "scores.json", "index.html"}
    assert size(folder / "step_00001000.png") == (2 * 32, 32 + 34)
    assert re.fullmatch(r"validation at step 1000: 2 pictures in .* s, .*step_00001000\.png", lines[-1])
    again, _ = make(tmp_path, checkpoint)  # a run that goes on
    assert again(2000, weights) == first
    assert (folder / "step_00002000.png").read_bytes() == (folder / "step_00001000.png").read_bytes()
    assert read_scores(folder) == {1000: first, 2000: first}
    page = (folder / "index.html").read_text()
    assert page.index("step_00002000.png") < page.index("step_00001000.png")
    assert "forest &amp; fog" in page
    assert page.count("<polyline") == 3
    (folder / "scores.json").write_text("{")  # only for looking at: what is damaged is begun anew
    assert again(3000, weights) == first
    assert read_scores(folder) == {3000: first}


def test_other_weights_other_pictures_and_nothing_of_training_changes(tmp_path, checkpoint, weights):
    validation, _ = make(tmp_path, checkpoint)
    trained = {name: torch.nn.Parameter(tensor * 1.5) for name, tensor in weights.items()}
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = validation(1, weights), validation(2, trained)
    assert first != second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.requires_grad and torch.equal(tensor, before[name]) for name, tensor in trained.items())
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())


def test_the_prompts_are_encoded_once(tmp_path, checkpoint, weights, monkeypatch):
    validation, _ = make(tmp_path, checkpoint)
    monkeypatch.setattr(type(validation._checkpoint), "text_encoder", lambda *_: pytest.fail("loaded again"))
    assert validation(1, weights) == validation(2, weights)


def test_batches_do_not_change_pictures(tmp_path, checkpoint, weights, monkeypatch):
    validation, _ = make(tmp_path, checkpoint)
    whole = validation._draw(weights)
    monkeypatch.setattr("train.validation.DENOISED_AT_ONCE", 1)
    monkeypatch.setattr("train.validation.DECODED_AT_ONCE", 1)
    torch.testing.assert_close(validation._draw(weights), whole, rtol=0, atol=2e-5)


def test_when_it_is_off(tmp_path, checkpoint):
    for model, more, words in [(checkpoint, {"prompts": ()}, "neither validation.prompts"), (None, {}, "whose autoencoder")]:
        validation, lines = make(tmp_path, model, **more)
        assert validation is None
        assert len(lines) == 1
        assert words in lines[0]
    given = settings(None)
    given.model.checkpoint = str(checkpoint)
    assert make_validation(given, TRANSFORMER, tmp_path, CPU, print) is not None
    assert not list(tmp_path.iterdir())


def test_no_room_is_said_and_training_goes_on(tmp_path, checkpoint, weights, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    validation, lines = make(tmp_path, checkpoint)
    with monkeypatch.context() as patched:
        patched.setattr(type(validation._checkpoint), "vae", full)
        assert validation(1, weights) == {}
    assert lines == ["validation at step 1 failed, training goes on: CUDA out of memory. Tried to allocate 2 GiB"]
    assert validation(2, weights)
    with monkeypatch.context() as patched:
        patched.setattr("sana_ref.checkpoint.Checkpoint.text_encoder", full)
        validation, lines = make(tmp_path, checkpoint)
        assert lines == ["validation: the prompts are not encoded yet: CUDA out of memory. Tried to allocate 2 GiB"]
    assert validation(3, weights)


def test_other_failures(tmp_path, checkpoint, weights):
    validation, lines = make(tmp_path, checkpoint)
    assert validation(1, weights | {"proj_out.bias": torch.full_like(weights["proj_out.bias"], torch.nan)}) == {}
    assert "values that are not finite" in lines[-1]
    (tmp_path / "validation").write_text("a file, where the folder belongs")
    assert validation(2, weights) == {}
    assert "cannot be written" in lines[-1]
    with pytest.raises(RuntimeError, match="Missing key"):  # a mistake of ours is not hidden
        validation(3, {})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"side": 65}, "got 65 px; expected a multiple of 32"),
        ({"config": replace(TRANSFORMER, caption_channels=50)}, "48 of text; expected 32 and 50"),
        ({"schedule": ScheduleFile(scheduler="scm", num_steps=2)}, "got 'scm', guidance_embeds False"),
        ({"judge": Path("nowhere")}, "validation.judge: nowhere cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(tmp_path, checkpoint, more, words):
    with pytest.raises(TrainingError, match=words):
        make(tmp_path, checkpoint, **more)


def test_settings_that_are_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        make(tmp_path, tmp_path / "nowhere")
    for wrong in ({"side": 0}, {"every": 0}, {"judged": 0}, {"guidance_scale": 0.5}, {"sides": 3}):
        with pytest.raises(ValidationError):
            ValidationSettings(**wrong)


def test_a_grid_of_any_number(tmp_path):
    grid(torch.zeros(5, 3, 32, 64), ["words " * 30] * 5, tmp_path / "a.png", columns=2, side=80)
    assert size(tmp_path / "a.png") == (160, 3 * 74)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_the_judge_knows_the_small_models_pictures(tmp_path):
    small = load(TINY)
    schedule = ScheduleFile(scheduler="flow_dpm_solver", num_steps=8, flow_shift=small.sampler.flow_shift)
    more = {"prompts": (), "judge": TINY, "judged": 1, "side": 512, "guidance_scale": 4.5, "schedule": schedule}
    validation, lines = make(tmp_path, TINY, small.transformer_config, **more)
    found = validation(10, small.state_dict("transformer"))
    assert found["scene_all"] >= 0.7, lines  # of 5 pictures
    assert found["scene_colour"] >= 0.9
    assert {"scene_single", "scene_left_right", "scene_above_below", "scene_two", "scene_three"} <= set(found)
    assert json.loads((tmp_path / "validation" / "scores.json").read_bytes())["10"] == found
