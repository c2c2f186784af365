"""The share of recognised captions, with a painter that composes what the caption says in place of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import recognised
from train.captions import COLOURS
from train.evaluate import Verdict

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"


@pytest.mark.parametrize(
    ("right", "total", "wanted"), [(0, 10, (0.0, 0.2775)), (9, 10, (0.5958, 0.9821)), (200, 200, (0.9812, 1.0))]
)
def test_wilson_interval(right: int, total: int, wanted: tuple[float, float]) -> None:
    assert recognised.wilson(right, total) == pytest.approx(wanted, abs=1e-4)


def plain(texts: list[str], seed: int) -> list[Image.Image]:
    """Backgrounds alone, always blue: no object can be right."""
    return [Image.new("RGB", (256, 256), COLOURS["blue"]) for _ in texts]


def test_backgrounds_without_objects_are_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    found = recognised.measure(plain, MODEL, ("single", "left_right"), 24, seed=0, sheets=tmp_path)
    for kind in ("single", "left_right"):
        questions = recognised.held_out(MODEL, kind, 24)
        assert sum(verdict.right for verdict in found[kind]) <= 1
        blue = [question.scene.colour == list(COLOURS).index("blue") for question in questions]
        assert [verdict.colour for verdict in found[kind]] == blue
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.width == 8 * 160
    said = capsys.readouterr().out
    assert "single: " in said
    assert "of 24" in said
    assert "  en: " in said


def test_samples_that_the_model_drew_are_recognised(tmp_path: Path) -> None:
    """The first column of the sheet in the model folder, cut out again: pictures of the model, judged by the shipped recogniser."""
    sheet = Image.open(MODEL / "samples.png").convert("RGB")
    names = ["rose", "coconut", "owl", "rose", "tangerine", "train", "cactus", "fire truck"]
    cells = [sheet.crop((2, 194 * row + 2, 158, 194 * row + 158)) for row in range(len(names))]
    eye, classes = recognised.recogniser.load(MODEL / "recogniser")
    guesses = eye(recognised.as_tensor(cells))[0].argmax(1).tolist()
    assert [classes[guess] for guess in guesses] == names


def test_more_captions_than_there_are_gives_all() -> None:
    assert len(recognised.held_out(MODEL, "two", 10**6)) == 100


class FakeEngine:
    """What `main` uses of SanaEngine."""

    backend, device = "onnxruntime", "a processor"

    def __init__(self, bundle: Path) -> None:
        self.manifest = type("Manifest", (), {"model": "sana-tiny"})
        self.bundle = type("Bundle", (), {"digest": "0" * 64})

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def generate(self, texts: list[str], seed: int) -> list[Image.Image]:
        return plain(texts, seed)


def test_recorded_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, object]] = []

    def record(figure: str, value: float, unit: str, *, note: str) -> dict[str, object]:
        lines.append({"figure": figure, "value": value, "unit": unit, "note": note})
        return lines[-1]

    monkeypatch.setattr(recognised, "SanaEngine", FakeEngine)
    monkeypatch.setattr(recognised, "record", record)
    arguments = ["--model", str(MODEL), "--captions", "4", "--sheets", str(tmp_path), "--record"]
    assert recognised.main(arguments) == 0
    assert [(line["figure"], line["unit"]) for line in lines] == [("tiny_single_object_recognised", "%")]
    assert "onnxruntime on a processor" in str(lines[0]["note"])
    assert "the recogniser itself names 100.0 % of composed" in str(lines[0]["note"])


def test_interrupt_ends_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> list[Image.Image]:
        raise KeyboardInterrupt

    monkeypatch.setattr(recognised, "SanaEngine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "generate", interrupted)
    assert recognised.main(["--model", str(MODEL), "--sheets", str(tmp_path)]) == 130
    assert "nothing was recorded" in capsys.readouterr().err


def test_a_missing_bundle_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recognised.main(["--bundle", str(tmp_path / "none"), "--model", str(MODEL)]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_record_wants_single_objects() -> None:
    with pytest.raises(SystemExit, match="2"):
        recognised.main(["--kind", "two", "--record"])


def test_misses_come_first_on_the_sheet(tmp_path: Path) -> None:
    questions = recognised.held_out(MODEL, "single", 3)
    verdicts = [Verdict(True, True, (0,)), Verdict(True, False, (0,)), Verdict(True, True, (0,))]
    colours = np.array([[[-1.0]], [[1.0]], [[-1.0]]], np.float32)
    pictures = torch.from_numpy(np.broadcast_to(colours[..., None], (3, 3, 8, 8)).copy())
    recognised.sheet(pictures, questions, verdicts, ["dog"], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert [sheet.getpixel((160 * column + 80, 80))[0] for column in range(3)] == [255, 0, 0]
