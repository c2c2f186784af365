"""`sana config show`."""

import json

import pytest

from apps.cli.main import main


def test_every_value_has_its_origin(capsys):
    assert main(["config", "show", "sana_1600m_4kpx", "trainer.steps=7", "env=cluster"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(" = ")[0].strip(): line for line in lines}
    assert found["trainer.steps"].split() == ["trainer.steps", "=", "7", "command", "line"]
    assert "configs/experiment/sana_1600m_4kpx.yaml:" in found["objective.flow_shift"]
    assert "${oc.env:SANA_DATA," in found["env.data"]
    assert len({line.index(" = ") for line in lines}) == 1
    assert all("None" not in line for line in lines)


def test_json(capsys):
    assert main(["config", "show", "sana_600m_512px", "trainer.clip=null", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainer.clip"] == {"value": None, "origin": "command line"}
    assert found["data.resolution"]["value"] == 512


def test_an_unknown_experiment_names_the_nearest(capsys):
    assert main(["config", "show", "sana_600m_1024"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("sana: error: experiment: got 'sana_600m_1024'; did you mean 'sana_600m_1024px'?")
    assert not printed.out


def test_a_folder_of_ones_own(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - sana_600m_512px\n  - _self_\nname: mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert main(["config", "show", "mine", "--config-dir", str(tmp_path)]) == 0
    assert f"{tmp_path}/experiment/mine.yaml:5" in capsys.readouterr().out


@pytest.mark.slow
def test_the_schema_is_asked(capfd):
    assert main(["config", "show", "sana_600m_512px", "trainer.steps=0", "--check"]) == 2
    assert "trainer.steps: got 0; expected greater than or equal to 1 (command line)" in capfd.readouterr().err
    assert main(["config", "show", "sana_600m_512px", "--check"]) == 0
    assert "fits the schema" in capfd.readouterr().err


def test_on_a_terminal_it_is_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["config", "show", "sana_600m_512px"]) == 0
    assert "from" in capsys.readouterr().out.split("model.variant")[0]


@pytest.mark.parametrize("arguments", [["config"], ["config", "show"], ["config", "shw", "x"]])
def test_usage(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: sana config" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["build", "runtime"])
def test_a_file_right_in_configs(name, capfd):
    assert main(["config", "show", name, "--check"]) == 0
    printed = capfd.readouterr()
    assert f"configs/{name}.yaml:" in printed.out
    assert "fits the schema" in printed.err


@pytest.mark.slow
def test_each_is_held_against_its_own_schema(capfd, tmp_path):
    assert main(["config", "show", "build", "precision=fp61", "--check"]) == 2
    assert "precision: got 'fp61'; did you mean 'fp16'?" in capfd.readouterr().err
    assert main(["config", "show", "runtime", "steps=0", "--check"]) == 2
    assert "steps: got 0; expected greater than or equal to 1 (command line)" in capfd.readouterr().err
    (tmp_path / "build_wide.yaml").write_text("defaults:\n  - build\n  - _self_\nmax_sides: 2048\n")
    assert main(["config", "show", "build_wide", "--check", "--config-dir", str(tmp_path)]) == 2
    assert "max_sides: unknown key; did you mean 'max_side'?" in capfd.readouterr().err
    (tmp_path / "other.yaml").write_text("a: 1\n")
    assert main(["config", "show", "other", "--config-dir", str(tmp_path)]) == 0
    assert main(["config", "show", "other", "--check", "--config-dir", str(tmp_path)]) == 2
    assert "other: no schema for it" in capfd.readouterr().err
