"""Scene scores, with painters that are known to be right or wrong in place of a model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import quality
from benchmarks.scene_score import CATEGORIES, Score, diversity, frechet_distance, hit, scores, wilson
from sana_ref.pipeline import SanaReference
from train.tiny import recogniser
from train.tiny.captions import ABOVE_BELOW, COLOURS, KIND_NAMES, LEFT_RIGHT, SINGLE, THREE, TWO, Scene
from train.tiny.evaluate import Question, Verdict

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"


@pytest.mark.parametrize(
    ("right", "total", "wanted"), [(0, 10, (0.0, 0.2775)), (9, 10, (0.5958, 0.9821)), (200, 200, (0.9812, 1.0))]
)
def test_wilson_interval(right: int, total: int, wanted: tuple[float, float]) -> None:
    assert wilson(right, total) == pytest.approx(wanted, abs=1e-4)


def question(kind: int, language: str = "en") -> Question:
    return Question("", language, Scene(kind, 3, 5 if kind in (LEFT_RIGHT, ABOVE_BELOW) else -1, 2))


def test_what_each_category_asks() -> None:
    swapped = Verdict(right=False, colour=True, guess=(5, 3))
    assert hit("two", question(LEFT_RIGHT), swapped) is True
    assert hit("position", question(LEFT_RIGHT), swapped) is False
    assert hit("two", question(ABOVE_BELOW), Verdict(right=False, colour=True, guess=(3, 3))) is False
    assert hit("counting", question(THREE), swapped) is False
    assert hit("counting", question(SINGLE), swapped) is None
    assert hit("language", question(SINGLE), swapped) is None
    assert hit("language", question(TWO, "zh"), Verdict(right=True, colour=False, guess=(3, 3))) is True
    found = scores([question(SINGLE), question(TWO, "de")], [swapped, Verdict(right=True, colour=False, guess=(3, 3))])
    assert found == {
        "single": Score(right=0, total=1),
        "counting": Score(right=1, total=1),
        "colour": Score(right=1, total=2),
        "language": Score(right=1, total=1),
    }


def samples() -> tuple[list[Image.Image], list[str]]:
    """Single objects on the sheet in the model folder, cut out again: pictures of the model, and what they show."""
    sheet = Image.open(MODEL / "samples.png").convert("RGB")
    names = ["rose", "coconut", "owl", "rose", "tangerine", "train", "cactus", "fire truck"]
    corners = [(160 * (number % 4) + 2, 194 * (number // 4) + 2) for number in range(len(names))]  # four of them begin each row
    return [sheet.crop((left, top, left + 156, top + 156)) for left, top in corners], names


def test_samples_that_the_model_drew_are_recognised() -> None:
    cells, names = samples()
    eye, classes = recogniser.load(MODEL / "recogniser")
    assert [classes[guess] for guess in eye(quality.as_tensor(cells))[0].argmax(1).tolist()] == names


def test_distances_in_the_judges_features() -> None:
    eye, _ = recogniser.load(MODEL / "recogniser")
    pictures = quality.as_tensor(samples()[0])
    assert frechet_distance(eye, pictures, pictures) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(eye, pictures, -pictures) > 1
    assert diversity(eye, pictures[:1].repeat(4, 1, 1, 1)[None]) == pytest.approx(0, abs=1e-6)
    assert diversity(eye, pictures[None]) > 0.01


def plain(texts: list[str], seed: int) -> list[Image.Image]:
    """Backgrounds alone, always blue: no object can be right."""
    return [Image.new("RGB", (256, 256), COLOURS["blue"]) for _ in texts]


@pytest.mark.slow
def test_backgrounds_without_objects_are_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    report = quality.measure(plain, MODEL, captions=12, seed=0, sprites=None, out=tmp_path, title="blue <b>")
    questions = quality.held_out(MODEL, 12)
    assert len(questions) == 12 * len(KIND_NAMES)
    blue = sum(each.scene.colour == list(COLOURS).index("blue") for each in questions)
    assert (report["colour"]["right"], report["colour"]["total"]) == (blue, len(questions))
    assert all(report[name]["right"] <= 1 for name in CATEGORIES if name != "colour")
    assert report["diversity"] == pytest.approx(0, abs=1e-6)
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure") == len(questions)
    assert "blue &lt;b&gt;" in page
    assert "need --sprites" in capsys.readouterr().out


class FakeEngine:
    """What `main` uses of SanaEngine."""

    backend, device = "onnxruntime", "a processor"

    def __init__(self, bundle: Path, backend: str) -> None:
        self.manifest = type("Manifest", (), {"model": "sana-tiny"})
        self.bundle = type("Bundle", (), {"digest": "0" * 64})

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def generate(self, texts: list[str], seed: int) -> list[Image.Image]:
        return plain(texts, seed)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr(quality, "SanaEngine", FakeEngine)
    return tmp_path


@pytest.mark.slow
def test_recorded_figures(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, float, str, str]] = []
    monkeypatch.setattr(quality, "record", lambda figure, value, unit, *, note: lines.append((figure, value, unit, note)))
    arguments = [str(bundle), "--judge", str(MODEL), "--captions", "6", "--out", str(bundle / "out"), "--record"]
    assert quality.main(arguments) == 0
    assert [line[0] for line in lines] == [f"tiny_scene_{name}" for name in CATEGORIES]
    assert {line[2] for line in lines} == {"share"}
    assert all("onnxruntime on a processor" in line[3] and "real scenes: not taken" in line[3] for line in lines)


def test_interrupt_ends_quietly(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> list[Image.Image]:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEngine, "generate", interrupted)
    assert quality.main([str(bundle), "--judge", str(MODEL), "--out", str(bundle / "out")]) == 130
    assert "nothing was recorded" in capsys.readouterr().err
    assert not (bundle / "out").exists()


def test_what_cannot_be_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main([str(tmp_path), "--judge", str(MODEL)]) == 1
    assert f"{tmp_path}: got neither a bundle" in capsys.readouterr().err
    assert quality.main([str(MODEL), "--judge", str(MODEL), "--backend", "tensorrt"]) == 1
    assert "which PyTorch draws" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_folder_is_drawn_by_pytorch_as_a_bundle_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference itself, with few captions and steps: sana-tiny draws what they say."""
    monkeypatch.setattr(quality, "DIVERSITY_SEEDS", 2)
    monkeypatch.setattr(SanaReference, "generate", functools.partialmethod(SanaReference.generate, steps=8))
    assert quality.main([str(MODEL), "--judge", str(MODEL), "--captions", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert "PyTorch fp32" in report["title"]
    assert report["single"]["right"] == report["single"]["total"] == 1
