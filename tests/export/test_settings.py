"""The configuration of a build: its YAML, its schema, and the flags over both."""

import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import ConfigError
from engines.spec import COMPONENTS
from export.build_engine import _parser, main
from export.settings import BuildSettings, load
from export.settings import main as check
from runtime.config import CONFIGS
from runtime.settings import RuntimeSettings

ROOT = Path(__file__).parents[2]


def test_the_file_says_every_default():
    settings = load()
    assert settings.components == COMPONENTS
    assert (settings.precision, settings.target, settings.max_batch) == ("fp16", ("current",), 4)
    unset = {name for name, value in settings.model_dump().items() if value is None}
    assert (settings.calibrate, settings.recipe_keys, settings.device) == (True, (), "auto")
    said = {"precision", "target", "components", "max_batch", "calibrate", "recipe_keys", "device"}
    assert unset == set(BuildSettings.model_fields) - said


def test_each_key_has_a_flag_and_each_flag_a_key():
    flags = {action.dest for action in _parser()._actions} - {"help", "overrides", "config", "config_dir"}
    assert flags == set(BuildSettings.model_fields)
    assert vars(_parser().parse_args([])) == {"overrides": [], "config": "build", "config_dir": None}


def test_no_key_is_a_group():
    """`key=value` would then look for a file."""
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    assert not groups & {*BuildSettings.model_fields, *RuntimeSettings.model_fields}


def test_flags_lie_over_overrides_and_those_over_the_file():
    settings = load(overrides=["max_batch=2", "min_side=64"], flags={"max_batch": 3, "out": Path("b"), "target": "sm80, sm89"})
    assert (settings.max_batch, settings.min_side, settings.out, settings.target) == (3, 64, Path("b"), ("sm80", "sm89"))
    assert load(overrides=["target=[sm80,sm89]", "components=decoder"]).target == ("sm80", "sm89")


def test_a_file_of_ones_own_inherits(tmp_path, capsys):
    (tmp_path / "build_wide.yaml").write_text("defaults:\n  - build\n  - _self_\nmax_side: 2048\ncheckpoint: /no/such/folder\n")
    settings = load("build_wide", config_dir=tmp_path)
    assert (settings.max_side, settings.max_batch, settings.checkpoint) == (2048, 4, "/no/such/folder")
    words = ["target=onnx", "--config", "build_wide", "--out", str(tmp_path / "b"), "--config-dir", str(tmp_path), "max_batch=2"]
    assert main(words) == 1  # it got as far as the checkpoint
    assert "/no/such/folder: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "flags", "words"),
    [
        (["max_batchh=3"], {}, "did you mean 'max_batch'?"),
        (["+max_batchh=3"], {}, "max_batchh: unknown key; did you mean 'max_batch'?"),
        (["max_batch='3'"], {}, "max_batch: got '3'; expected a valid integer (command line)"),
        (["variant=fp32"], {}, "variant: got 'fp32'; "),
        ([], {"precision": "int9"}, "precision: got 'int9'; did you mean 'int8'?"),
        (
            ["precision=fp61"],
            {},
            "precision: got 'fp61'; did you mean 'fp16'? Valid: fp32, fp16, bf16, int8, fp8, nvfp4; or a recipe, whose file ends "
            "in .yaml (command line)",
        ),
        (["target=[]"], {}, "target: got (); "),
        (["target=[1]"], {}, "target.0: got 1; expected a valid string"),
        (["target=null"], {}, "target: got None; expected a valid "),
    ],
)
def test_a_mistake_is_said_with_its_origin(overrides, flags, words):
    with pytest.raises(ConfigError) as caught:
        load(overrides=overrides, flags=flags)
    assert words in str(caught.value)


def test_what_has_no_default_is_asked_for(capsys):
    assert main(["--out", "b"]) == 2
    assert "model: got none; expected one. Give it: --model" in capsys.readouterr().err
    assert main(["--model", "m", "--config", "biuld"]) == 2
    assert "configuration: got 'biuld'; did you mean 'build'?" in capsys.readouterr().err


def test_the_program_that_checks(capsys):
    assert check(["build", "precision=bf16"]) == 0
    assert check(["build", "precision=bf61"]) == 2
    assert "did you mean 'bf16'?" in capsys.readouterr().err


def test_settings_need_no_pytorch():
    code = "import sys, export.settings as s; s.load(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_the_example_of_the_documentation(tmp_path):
    text = (ROOT / "docs" / "config.md").read_text().split("```yaml\n# mine/build_wide.yaml\n")[1].split("```")[0]
    (tmp_path / "build_wide.yaml").write_text(text)
    settings = load("build_wide", ["max_batch=2"], tmp_path)
    assert (settings.target, settings.max_side, settings.max_batch, settings.precision) == (("sm89", "sm120"), 2048, 2, "fp16")
