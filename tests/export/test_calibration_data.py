"""What a calibration draws: prompts of a file, runs that are kept one by one, and the same bits every time."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_checkpoint import write_checkpoint

from engines.errors import SpecError
from engines.store import Store
from export import calibration_data
from export.calibration_data import default_sizes, draw_all, plan_runs
from export.calibration_prompts import MAX_FILE_BYTES, SHIPPED, prompts_file, read_prompts
from export.progress import Progress
from export.recipe import CalibrationSettings
from sana_ref.pipeline import SanaReference
from train.tiny.calibration_prompts import calibration_captions
from train.tiny.emoji_list import CLASSES
from train.tiny.prepare_sprites import names_of

TINY = Path(__file__).parents[2] / "models" / "sana-tiny"


def quiet() -> Progress:
    return Progress(Console(quiet=True))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> SanaReference:
    return SanaReference(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def settings(tmp_path: Path, **changes: object) -> CalibrationSettings:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n# no prompt\n\nein Bär\n", encoding="utf-8")
    values = {
        "prompts": tmp_path / "prompts.txt",
        "num_prompts": 3,
        "steps": 2,
        "sizes": ((64, 64), (96, 64)),
        "seed": 5,
        "rows": 8,
    }
    return CalibrationSettings(**{**values, **changes})


def test_prompts_ship_and_sana_tiny_has_its_own():
    assert len(set(read_prompts(SHIPPED, 64))) == 64
    assert prompts_file(None, TINY) == TINY / "calibration_prompts.txt"
    assert prompts_file(None, TINY / "vae") == SHIPPED


def test_sana_tinys_prompts_are_of_its_grammar_and_not_held_out():
    """By the generator, which leaves out what training must not see, and by the list itself."""
    prompts = read_prompts(TINY / "calibration_prompts.txt", 64)
    assert list(prompts) == calibration_captions([names_of(*entry) for entry in CLASSES])
    held_out = json.loads((TINY / "held_out_captions.json").read_text(encoding="utf-8"))
    assert not {row["caption"] for rows in held_out.values() for row in rows} & set(prompts)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read"),
        (b"a\nb\n", "got 2 calibration prompts; expected 3"),
        (b"a\n\xff\n", "prompts.txt:2: not UTF-8"),
        (b"a\nb\0c\nd", "prompts.txt:2: got a NUL"),
        (b"a" * 100_001, "got 100001 characters"),
        (b"a\n" * (MAX_FILE_BYTES // 2 + 1), "bytes of prompts"),
    ],
)
def test_bad_files_of_prompts(tmp_path, data, words):
    if data is not None:
        (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(SpecError, match="(?s)" + words):
        read_prompts(tmp_path / "prompts.txt", 3)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20), max_size=6))
def test_what_is_written_is_read(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not "\n".join(lines).startswith("\ufeff"):
        assert list(read_prompts(path, len(wanted))) == wanted


def test_sizes_take_turns_and_must_fit(reference, tmp_path):
    specs = plan_runs(reference.checkpoint, settings(tmp_path))
    assert [(s.width, s.height, s.seed, s.steps) for s in specs] == [(64, 64, 5, 2), (96, 64, 6, 2), (64, 64, 7, 2)]
    for sizes in ((), ((65, 64),), ((0, 64),)):
        with pytest.raises(SpecError, match=r"calibration\.sizes: got"):
            plan_runs(reference.checkpoint, settings(tmp_path, sizes=sizes))
    assert default_sizes(SanaReference(TINY).checkpoint) == ((512, 512), (640, 384), (384, 640))  # what it was trained for


def test_a_killed_calibration_goes_on_and_gives_the_same_bits(reference, tmp_path, monkeypatch):
    specs = plan_runs(reference.checkpoint, settings(tmp_path))
    whole = draw_all(reference, specs, Store(tmp_path / "whole"), quiet())
    assert [run.latents.shape for run in whole] == [(3, 32, 2, 2), (3, 32, 2, 3), (3, 32, 2, 2)]

    real, drawn = calibration_data.draw, []

    def draw(reference, spec, text=None):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(spec)
        return real(reference, spec, text)

    monkeypatch.setattr(calibration_data, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        draw_all(reference, specs, Store(tmp_path / "parts"), quiet())
    drawn[:] = [None]  # one more is allowed, and one more is needed
    again = draw_all(reference, specs, Store(tmp_path / "parts"), quiet())
    assert drawn == [None, specs[2]]
    assert all(torch.equal(a.latents, b.latents) and a.key == b.key for a, b in zip(whole, again, strict=True))


def test_a_run_is_kept_by_all_that_decides_it(reference, tmp_path):
    first, *_ = plan_runs(reference.checkpoint, settings(tmp_path))
    others = [
        plan_runs(reference.checkpoint, settings(tmp_path, **change))[0]
        for change in ({"seed": 6}, {"steps": 3}, {"sizes": ((96, 64),)})
    ]
    keys = {spec.key(reference.checkpoint, torch.float32, "cpu") for spec in (first, *others)}
    keys |= {first.key(reference.checkpoint, torch.bfloat16, "cpu"), first.key(reference.checkpoint, torch.float32, "cuda:0")}
    assert len(keys) == 6


def test_the_result_is_what_the_pipeline_draws(reference, tmp_path):
    spec = plan_runs(reference.checkpoint, settings(tmp_path))[1]
    (run,) = draw_all(reference, [spec], Store(tmp_path / "store"), quiet())
    seen: list[torch.Tensor] = []
    reference.generate(
        spec.prompt, seed=spec.seed, steps=spec.steps, width=spec.width, height=spec.height, on_step=lambda i, n, x: seen.append(x)
    )
    assert torch.equal(run.latents[1:], torch.cat(seen))
