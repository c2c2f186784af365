"""The record of figures."""

import sys

from benchmarks import figures


def test_a_command_names_no_folder_of_the_machine(monkeypatch) -> None:
    root = figures.ROOT
    monkeypatch.setattr(
        sys, "argv", [str(root / "benchmarks/latency.py"), "--bundle", str(root / "out/a b"), "--note", "random weights"]
    )
    assert figures.command() == "python benchmarks/latency.py --bundle 'out/a b' --note 'random weights'"
