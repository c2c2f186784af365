"""The runtime's defaults are said three times, in YAML, in the schema and in SanaEngine: here they are held together."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import ConfigError
from runtime import SanaEngine
from runtime.settings import RuntimeSettings, load

ROOT = Path(__file__).parents[2]


def test_the_file_says_what_is_built_in():
    assert load() == RuntimeSettings()


def test_the_engines_own_defaults_are_the_same():
    built_in = RuntimeSettings()
    init, draw = (inspect.signature(call).parameters for call in (SanaEngine.__init__, SanaEngine.generate))
    for name in ("backend", "verify", "num_threads"):
        assert init[name].default == getattr(built_in, name), name
    for name in ("steps", "guidance", "width", "height", "scheduler"):
        assert draw[name].default == getattr(built_in, name), name
    assert draw["negative_prompts"].default == built_in.negative


def test_a_file_of_ones_own_inherits(tmp_path):
    (tmp_path / "runtime_small.yaml").write_text("defaults:\n  - runtime\n  - _self_\nwidth: 512\nschedule_file: sana_4k\n")
    settings = load("runtime_small", ["steps=5"], tmp_path)
    assert settings == RuntimeSettings(width=512, schedule_file=Path("sana_4k"), steps=5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backend=cuda", "backend: got 'cuda'; "),
        ("steps=0", "steps: got 0; expected greater than or equal to 1 (command line)"),
        ("guidance=1e9", "guidance: got 1000000000.0; expected less than or equal to 100"),
        ("verify=1", "verify: got 1; expected a valid boolean"),
        ("stepz=1", "did you mean 'steps'?"),
        ("+stepz=1", "stepz: unknown key; did you mean 'steps'?"),
    ],
)
def test_a_mistake_is_said(override, words):
    with pytest.raises(ConfigError) as caught:
        load("runtime", [override])
    assert words in str(caught.value)


def test_a_scheduler_or_a_schedule():
    with pytest.raises(ConfigError, match="the configuration: got both of scheduler and schedule_file"):
        load("runtime", ["scheduler=flow_euler", "schedule_file=sana"])


def test_what_is_built_in_needs_no_hydra():
    code = "import sys, runtime, runtime.settings as s; s.RuntimeSettings(); print(*({'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stdout.strip()
