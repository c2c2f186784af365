"""The record of figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures


def test_a_command_names_no_folder_of_the_machine(monkeypatch) -> None:
    root = figures.ROOT
    monkeypatch.setattr(
        sys, "argv", [str(root / "benchmarks/latency.py"), "--bundle", str(root / "out/a b"), "--note", "random weights"]
    )
    assert figures.command() == "python benchmarks/latency.py --bundle 'out/a b' --note 'random weights'"


def test_what_benchmarks_append_to_is_no_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else only the first run of latency.py would be of a commit."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.delenv("SANA_COMMIT", raising=False)
    assert figures.commit() == "unknown"
    git("init", "-q")
    assert figures.commit() == "unknown"  # there is none
    files = [tmp_path / name for name in ("benchmarks/history/sana-tiny.jsonl", "benchmarks/results/figures.jsonl", "code.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a\n")
    git("add", "-A")
    git("commit", "-q", "-m", "c")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    for file, expected in zip(files, (head, head, f"{head}+changes"), strict=True):
        file.write_text("b\n")
        assert figures.commit() == expected
    monkeypatch.setenv("PATH", str(tmp_path))
    assert figures.commit() == "unknown"


def test_a_result_that_cannot_be_written_leaves_that_of_before(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    figures.write_result(path, {"größe": 1})
    before = path.read_bytes()
    assert json.loads(before) == {"größe": 1}
    with pytest.raises(TypeError):
        figures.write_result(path, {"a": 2, "b": object()})
    assert path.read_bytes() == before
