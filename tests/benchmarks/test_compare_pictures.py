"""Two painters compared from the command line, with painters that are known in place of models."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import write_fake_bundle
from PIL import Image

from apps.cli.main import main as sana
from benchmarks import compare_pictures
from engines.bundle import Bundle
from engines.parity_report import parse_report
from train.tiny.captions import COLOURS

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"


def plain(level: int):
    """Backgrounds alone, blue and `level` levels off: no object can be right."""
    colour = tuple(np.clip(np.array(COLOURS["blue"]) + level, 0, 255).tolist())
    return lambda texts, seed: [Image.new("RGB", (64, 64), colour) for _ in texts]


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The first draws blue, the second 5 levels off."""
    torch.set_num_threads(1)
    first, second = (write_fake_bundle(tmp_path / name, seed=seed).path for seed, name in enumerate(("first", "second")))
    monkeypatch.setattr(
        compare_pictures, "painter", lambda source, backend, stack: (plain(5 * (source == second)), "fake, bundle x, a back end")
    )
    return first, second


def arguments(bundles: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    return [*map(str, bundles), "--judge", str(MODEL), "--captions", "1", "--seeds", "2", "--out", str(out), *more]


@pytest.mark.slow
def test_what_is_written(bundles, tmp_path, capsys):
    assert compare_pictures.main(arguments(bundles, tmp_path / "out")) == 0
    summary = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert (summary["prompts"], summary["seeds"]) == (5, 2)
    assert summary["psnr_db"]["mean"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-3)
    assert summary["scores"]["points_lost"]["mean"] == summary["scores"]["first"]["mean"] - summary["scores"]["second"]["mean"]
    assert summary["categories"][0]["single"] == {"right": 0, "total": 2}
    assert summary["against"]["digest"] == Bundle.open(bundles[0]).digest
    assert summary["denoiser"]["ratio"] == 1
    assert (tmp_path / "out" / "quality" / "index.html").read_text().count("<img") == 3 * 10
    assert "ratio 1.000" in capsys.readouterr().out


def test_the_judge_counts_what_is_lost(bundles):
    """A judge whose verdicts are known: the second loses one picture of four."""
    eye = compare_pictures.Judge(MODEL, 1)
    right, wrong = (compare_pictures.Verdict(right=each, colour=True, guess=(0,)) for each in (True, False))
    eye.verdicts = ([[right, right], [right, wrong]], [[right, wrong], [right, wrong]])
    found = eye.scores()
    assert (found.first.mean, found.second.mean, found.points_lost.mean) == (75, 50, 25)
    assert found.points_lost.low >= 0  # paired: the second is never better


@pytest.mark.slow
def test_into_a_bundle_and_out_of_inspect(bundles, tmp_path, capsys, monkeypatch):
    second = bundles[1]
    before = Bundle.open(second)
    for _ in range(2):  # a second time it is replaced
        assert compare_pictures.main(arguments(bundles, tmp_path / "out", "--rows", "2", "--into-bundle")) == 0
    after = Bundle.open(second)  # all digests fit
    assert after.manifest.files["quality/index.html"].role == "report"
    assert {name for name in after.manifest.files if not name.startswith("quality/")} == set(before.manifest.files)
    quality = parse_report(after.file("parity.json").read_bytes(), source="the test").quality
    assert quality is not None
    assert len(quality.rows) == 2
    capsys.readouterr()

    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert sana(["inspect", str(second), "--open"]) == 0
    assert opened == [(second / "quality" / "index.html").as_uri()]
    said = capsys.readouterr().out
    for line in quality.lines():
        assert line in said
    page = second / "quality" / "index.html"
    picture = second / "quality" / "000-first.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-1] + b"x")  # of the same size: only the digest tells
    assert sana(["inspect", str(second), "--open"]) == 2
    assert "000-first.png was changed" in capsys.readouterr().err
    picture.write_bytes(whole)
    page.write_text(page.read_text().replace("<table>", "<script", 1))
    assert sana(["inspect", str(second), "--open"]) == 2
    assert "got another page" in capsys.readouterr().err
    assert len(opened) == 1


def test_inspect_of_a_bundle_without_pictures(bundles, capsys):
    assert sana(["inspect", str(bundles[0])]) == 0
    assert "No quality section" in capsys.readouterr().out
    assert sana(["inspect", str(bundles[0]), "--open"]) == 2
    assert "expected a bundle with a quality section" in capsys.readouterr().err


@pytest.mark.slow
def test_recorded_figures(bundles, tmp_path, monkeypatch):
    lines: list[tuple[str, float, str]] = []
    monkeypatch.setattr(compare_pictures, "record", lambda figure, value, unit, *, note: lines.append((figure, value, note)))
    options = compare_pictures.parse(arguments(bundles, tmp_path / "out"))
    options.record = "int8"
    section = compare_pictures.run(options)
    assert [name for name, _, _ in lines] == [f"quant_int8_{each}" for each in ("scene_points_lost", "psnr_db", "lpips")]
    assert [value for _, value, _ in lines[1:]] == [section.psnr_db.mean, section.lpips.mean]
    assert all("5 captions kept out, 2 seeds each" in note for _, _, note in lines)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--record", "int8"], "got a denoiser in fp16, compared with fp16; expected int8"),
        (["--captions", "0"], "--captions: got 0; expected 1 to"),
        (["--rows", "201"], "--rows: got 201"),
    ],
)
def test_what_is_refused(bundles, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        compare_pictures.main(arguments(bundles, tmp_path / "out", *more))
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(bundles, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_pictures.main([str(bundles[0]), str(tmp_path)])
    assert "expected a bundle" in capsys.readouterr().err


def test_interrupt_writes_nothing(bundles, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> list[Image.Image]:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_pictures, "painter", lambda *_: (interrupted, "a, b, c"))
    assert compare_pictures.main(arguments(bundles, tmp_path / "out")) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
