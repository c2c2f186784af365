"""Figures are taken one at a time, of bundles that are there, and what is done stays done."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import latency, take_figures
from benchmarks.take_figures import GROUPS, Group, asked_for, main
from export.build_engine import _parser as build_parser
from sana_ref.variants import VARIANTS

# In place of all programs. It writes down when it ran, makes what --out and --cache name, and does what its first word says.
PROGRAM = """
import os, pathlib, sys, time
words = sys.argv[1:]
log = pathlib.Path(os.environ["TAKEN"])
def note(what):
    with log.open("a") as file:
        file.write(f"{what} {pathlib.Path(sys.argv[0]).stem} {' '.join(pathlib.Path(w).name for w in words)}\\n")
note("begin")
for made in {"--out", "--cache"}.intersection(words):
    pathlib.Path(words[words.index(made) + 1]).mkdir(parents=True, exist_ok=True)
if "slow" in words:
    log.with_name("pid").write_text(str(os.getpid()))
    time.sleep(60)
note("end")
sys.exit(f"it did not like {words[0]}" if "bad" in words else 0)
"""
GROUP = Group(
    about="a test",
    checkpoint=("c",),
    common=(),
    bundles={"a": ("first",), "b": ("second",)},
    figures={"one": ("figure.py", "@a", "@b"), "two": ("figure.py", "@b", "--model", "@model")},
)


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """The exit code, and what ran since the last call."""
    for name in ("benchmarks/random_checkpoint.py", "export/build_engine.py", "figure.py"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROGRAM)
    monkeypatch.setattr(take_figures, "ROOT", tmp_path / "root")
    monkeypatch.setattr(take_figures, "NEEDED_S", 0)
    monkeypatch.setattr(take_figures, "POLL_S", 0.02)
    monkeypatch.setenv("TAKEN", str(tmp_path / "log"))

    def call(group: Group = GROUP, *arguments: str) -> tuple[int, list[str]]:
        (tmp_path / "log").write_text("")
        code = main([*arguments, "--out", str(tmp_path / "out")], {"test": group})
        return code, (tmp_path / "log").read_text().splitlines()

    return call


def test_all_of_a_group(take, tmp_path: Path) -> None:
    code, ran = take()
    assert code == 0
    assert ran[:2] == ["begin random_checkpoint c --out model", "end random_checkpoint c --out model"]
    builds, figures = ran[2:6], ran[6:]
    assert {each.split(" ", 1)[1] for each in builds} == {
        f"build_engine --model model --target current --cache cache {word} --out {name}" for name, (word,) in GROUP.bundles.items()
    }
    assert figures == [f"{when} figure {words}" for words in ("a b", "b --model model") for when in ("begin", "end")]
    assert take() == (0, [])  # all is done
    assert take(GROUP, "--clean") == (0, [])
    assert not (tmp_path / "out" / "test" / "model").exists()
    assert take() == (0, [])  # and stays done


def test_a_checkpoint_is_called_as_its_variant(take, tmp_path: Path) -> None:
    """So that the history's files are."""
    code, ran = take(replace(GROUP, checkpoint=("--variant", "small")))
    assert code == 0
    assert ran[0] == "begin random_checkpoint --variant small --out small"
    assert ran[-1] == "end figure b --model small"


def test_bundles_share_the_cores(take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_figures, "default_threads", lambda: 8)
    script = tmp_path / "root" / "export" / "build_engine.py"
    script.write_text(f"import os\nprint('threads', os.environ['OMP_NUM_THREADS']){PROGRAM}")
    take()
    for name in GROUP.bundles:
        assert (tmp_path / "out" / "test" / "logs" / f"bundle {name}.log").read_text().startswith("threads 4")


def test_the_cache_goes_before_the_first_figure(take, tmp_path: Path) -> None:
    script, cache = tmp_path / "root" / "figure.py", tmp_path / "out" / "test" / "cache"
    script.write_text(f"import pathlib, sys\nassert not pathlib.Path({str(cache)!r}).exists()\n{PROGRAM}")
    assert take()[0] == 0
    assert (tmp_path / "out" / "test" / "a").exists()


@pytest.mark.slow
def test_the_cache_stays_for_a_bundle_that_failed(take, tmp_path: Path) -> None:
    cache = tmp_path / "out" / "test" / "cache"
    assert take(replace(GROUP, bundles={"a": ("bad",), "b": ()}))[0] == 1
    assert cache.exists()
    assert take()[0] == 0
    assert not cache.exists()


@pytest.mark.slow
def test_what_fails_is_said_and_the_others_go_on(take, capsys: pytest.CaptureFixture[str]) -> None:
    group = Group(about="", checkpoint=("c",), common=(), bundles={"a": ("bad",), "b": ()}, figures=GROUP.figures)
    code, ran = take(group)
    assert code == 1
    said = capsys.readouterr().out
    assert "test, bundle a: exit code 1" in said
    assert "it did not like --model" in said
    assert "test, figure one: it needs the bundle a, which is not there" in said
    assert [line for line in ran if line.startswith("begin figure")][-1] == "begin figure b --model model"
    code, ran = take()  # what failed is tried again, and only that
    assert code == 0
    assert [line.split()[1] for line in ran if line.startswith("begin")] == ["build_engine", "figure"]


@pytest.mark.slow
def test_the_limit(take, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = Group(about="", checkpoint=("c",), common=(), bundles={"a": ()}, figures={"one": ("figure.py", "slow")})
    began = time.monotonic()
    code, ran = take(slow, "--limit", "4")
    assert code == 3
    assert time.monotonic() - began < 30
    assert "figure one: the time is over" in capsys.readouterr().err
    assert ran[-1] == "begin figure slow"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    quick = Group(about="", checkpoint=("c",), common=(), bundles={"a": ()}, figures={"one": ("figure.py", "quick")})
    assert take(quick) == (0, ["begin figure quick", "end figure quick"])


@pytest.mark.slow
def test_what_ended_before_the_limit_is_done(take, tmp_path: Path) -> None:
    """Also beside a build that began earlier and has not ended."""
    group = Group(about="", checkpoint=("c",), common=(), bundles={"a": ("slow",), "b": ()}, figures=GROUP.figures)
    assert take(group, "--limit", "4")[0] == 3
    assert [each.name for each in (tmp_path / "out" / "test" / "done").glob("bundle *")] == ["bundle b"]


def test_a_figure_is_not_begun_shortly_before_the_end(take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_figures, "NEEDED_S", 1000)
    code, ran = take(GROUP, "--limit", "100")
    assert code == 3
    assert not any("figure" in line for line in ran)


def test_words_that_are_wrong(take, capsys: pytest.CaptureFixture[str]) -> None:
    assert take(GROUP, "tset") == (2, [])
    assert "group: got 'tset'; did you mean 'test'?" in capsys.readouterr().err
    assert take(GROUP, "test.one", "test.tow") == (2, [])  # before anything is done
    assert "figure of test: got 'tow'; did you mean 'two'? Valid: one, two." in capsys.readouterr().err
    assert take(GROUP, "test.") == (2, [])


@pytest.mark.slow
def test_one_figure_has_the_bundles_that_it_needs(take, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, ran = take(GROUP, "test.two", "--clean")
    assert code == 0
    assert [line.split(maxsplit=2)[1] for line in ran if line.startswith("begin")] == [
        "random_checkpoint",
        "build_engine",
        "figure",
    ]
    assert ran[-1] == "end figure b --model model"
    left = {each.name for each in (tmp_path / "out" / "test").iterdir()}
    assert left == {"model", "b", "cache", "done", "logs"}  # for the other figure and its bundle
    assert take(GROUP, "--list") == (0, [])
    assert "test: a test; left: one\n" in capsys.readouterr().out
    code, ran = take(GROUP, "test.one", "--clean")
    assert code == 0
    assert [line.split(maxsplit=2)[1] for line in ran if line.startswith("begin")] == ["build_engine", "figure"]
    assert {each.name for each in (tmp_path / "out" / "test").iterdir()} == {"done", "logs"}


def test_figures_are_taken_in_the_order_of_the_words(take) -> None:
    code, ran = take(GROUP, "test.two", "test")
    assert code == 0
    assert [line for line in ran if line.startswith("begin")][-2:] == ["begin figure b --model model", "begin figure a b"]
    assert [line.split()[1] for line in ran if line.startswith("begin")].count("build_engine") == 2


def test_a_group_comes_again_where_another_is_between() -> None:
    words = ["steps.4096px", "steps.1024px", "whole.picture", "steps.4096px"]
    assert asked_for(words, GROUPS) == [("steps", ["4096px", "1024px"]), ("whole", ["picture"]), ("steps", ["4096px"])]


def test_the_list(take, capsys: pytest.CaptureFixture[str]) -> None:
    assert take(GROUP, "--list") == (0, [])
    assert "test: a test; left: one, two\n" in capsys.readouterr().out
    assert take(GROUP, "--list", "test.two") == (0, [])
    assert "test: a test; left: two\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", GROUPS)
def test_the_programs_take_these_words(name: str) -> None:
    group = GROUPS[name]
    assert group.checkpoint[1] in VARIANTS
    for words in group.bundles.values():
        build_parser().parse_args(["--model", "m", "--out", "o", *group.common, *words])
    assert {word[1:] for words in group.figures.values() for word in words if word.startswith("@")} >= set(
        group.bundles
    )  # else: never built
    for program, *words in group.figures.values():
        assert {word[1:] for word in words if word.startswith("@")} <= {"model", *group.bundles}
        if program == take_figures.LATENCY[0]:
            options = latency.parser().parse_args(words)
            assert options.model is not None or not options.record


@pytest.mark.parametrize("name", ["sprint", "whole"])
def test_pictures_are_taken_beside_peers(name: str) -> None:
    program, *words = GROUPS[name].figures["picture"]
    assert program == take_figures.LATENCY[0]
    assert latency.parser().parse_args(words).peers == "eager,reduce-overhead,max-autotune"


@pytest.mark.parametrize("own", [None, "GROUPS"])
def test_what_max_autotune_need_not_time(own: str | None, take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody says otherwise. What it leaves out is said beside its figures."""
    (name, value), *_ = take_figures.TUNING.items()
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    (tmp_path / "root" / "figure.py").write_text(f"import os\nprint(os.environ[{name!r}])\n{PROGRAM}")
    take()
    assert (tmp_path / "out" / "test" / "logs" / "figure one.log").read_text().splitlines()[0] == (own or value)
    described = "GROUPS={}, KERNEL_H=3"  # as inductor has it
    assert [groups for groups in (1, 32, 1120, 11200) if re.search(value, described.format(groups))] == [1, 32]
    asked = [words for group in GROUPS.values() for words in group.figures.values() if take_figures.COMPILED[1] in words]
    assert asked
    assert {latency.parser().parse_args(words[1:]).note for words in asked} == {take_figures.SPARED}
