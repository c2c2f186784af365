"""What latency.py says of arguments, bundles and histories that it cannot use, and its exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from latency_records import Plant

from benchmarks import latency, latency_session
from benchmarks.latency_history import Record
from benchmarks.latency_work import Work
from engines.errors import RequestError
from runtime import SanaEngine


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sizes", "65"], "got 65 px; expected a multiple of 32"),
        (["--sizes", "512"], "from 32 to 128"),
        (["--batches", "9"], "the bundle takes 1 to 4"),
        (["--against", "diffusers_eager"], "Add it to --peers"),
        (["--peers", "eager"], "expected a --model as well"),
        (["--peers", "fastest", "--model", "x"], "Valid: eager, reduce-overhead, max-autotune, none"),
        (["--record"], "expected --model"),
        (["--rounds", "2"], "--rounds: got 2; expected at least 3"),
        (["--pictures", "2"], "--pictures: got 2; expected at least 3"),
        (["--threads", "0"], "--threads: got 0; expected at least 1"),
        (["--confirm", "-1"], "--confirm: got -1; expected at least 0"),
        (["--steps", "0"], "--steps: got 0; expected at least 1"),
        (["--percent", "nan"], "--percent: got nan; expected a number from 0"),
        (["--floor-ms", "-1"], "--floor-ms: got -1.0; expected a number from 0"),
        (["--sizes", "64", "--width", "64"], "got --width or --height as well"),
        (["--accept", "--no-history"], "--accept: got --no-history as well"),
        (["--accept", "0123456789ab"], "--accept 0123456789ab: got more to do"),
        (["--history", "/dev/null/history"], "--history: got /dev/null/history, where nothing can be written (Not a directory)"),
        (["--report", "/"], "--report: got /, which is a folder"),
        # What is wrong with the last work, before the first is measured:
        (["--sizes", "64,65"], "got 65 px; expected a multiple of 32"),
        (["--batches", "1,9"], "the bundle takes 1 to 4"),
        (["--components", "denoiser,picture", "--steps", "5000"], "steps: got 5000; expected an integer from 1 to 1000"),
        (["--components", "denoiser,text_encoder", "--text-tokens", "9999"], "--text-tokens: got 9999; expected"),
    ],
)
def test_what_cannot_be_measured_is_said(
    plant: Plant,
    program: Callable[..., int],
    arguments: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(latency_session, "measure", lambda *_: pytest.fail("measured"))
    assert program(*arguments) == 2
    assert why in capsys.readouterr().err


def test_a_damaged_history_is_said_before_anything_is_measured(
    plant: Plant, program: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "fake.jsonl").write_text('{"schema_version": 1')
    monkeypatch.setattr(latency_session, "measure", lambda *_: pytest.fail("measured"))
    assert program("--check") == program() == 2
    assert "fake.jsonl:1: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("CUDA out of memory"), 2, "RuntimeError: CUDA out of memory"),
        (OSError(28, "No space left on device"), 2, "latency: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "latency: interrupted"),
    ],
)
def test_exit_code_one_says_nothing_but_slower(
    plant: Plant,
    program: Callable[..., int],
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> Record:
        raise error

    monkeypatch.setattr(latency_session, "measure", fails)
    assert program("--check") == code
    assert said in capsys.readouterr().err


def test_peers_with_other_weights_are_refused(
    plant: Plant, program: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency_session, "measure", lambda *_: pytest.fail("measured"))
    assert program("--model", str(latency_session.TINY), "--peers", "none") == 2
    assert "Give that one, or build from this one" in capsys.readouterr().err


def test_a_misspelt_option_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latency.main(["--chek"])
    assert "did you mean --check?" in capsys.readouterr().err


def test_the_second_bundle_is_looked_for_before_the_first_is_measured(
    plant: Plant, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency_session, "measure", lambda *_: pytest.fail("measured"))
    assert latency.main(["--bundle", str(bundle), str(tmp_path / "missing"), "--no-history"]) == 2
    assert "missing: got nothing; expected the folder of a bundle" in capsys.readouterr().err


def test_figures_are_of_engines(
    plant: Plant, program: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency_session, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(latency_session.Session, "check_model", lambda *_: None)
    assert program("--record", "--model", str(latency_session.TINY)) == 2
    assert "--record: got onnxruntime; figures are of engines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            "denoiser,text_encoder",
            "got text_encoder, without text_encoder in .*; expected what can be done with text_projection, denoiser",
        ),
        ("denoiser,picture", "got picture, without text_encoder, decoder in "),
    ],
)
def test_a_bundle_that_has_not_all_components(asked: str, why: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        there = ("text_projection", "denoiser")
        files = {name: entry for name, entry in engine.manifest.files.items() if name.startswith(there)}
        part = engine.manifest.model_copy(update={"files": files})
        monkeypatch.setattr(engine, "manifest", part)
        works = [Work(component=each, width=64, height=64, batch=1) for each in asked.split(",")]
        works[0].check(engine)
        with pytest.raises(RequestError, match=why):
            works[1].check(engine)


@pytest.mark.parametrize("arguments", [["--sizes", "1x2x3"], ["--sizes", "big"], ["--batches", "0"], ["--components", "dit"]])
def test_bad_lists_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        latency.parser().parse_args(arguments)


def test_what_is_said_twice_is_measured_once() -> None:
    options = latency.parser().parse_args(["--sizes", "64,96,64x64", "--batches", "2,1,2", "--components", "decoder,decoder"])
    assert (options.sizes, options.batches, options.components) == ([(64, 64), (96, 96)], [2, 1], ["decoder"])
