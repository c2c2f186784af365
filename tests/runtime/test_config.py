"""Composition, origins, and what is said of mistakes: on small folders of its own, and once on the project's."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from engines.errors import ConfigError, SpecError
from runtime.config import CONFIGS, compose, compose_experiment, names_in_group, validate
from runtime.config_origins import Origin, Origins, leaves
from runtime.schedule import load_schedule

ROOT = Path(__file__).parents[2]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Section):
    kind: Literal["adamw", "came"]
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = False


class Toy(Section):
    name: str
    folder: Path
    optimizer: Optimizer


@pytest.fixture
def folder(tmp_path) -> Path:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    write("train.yaml", "defaults:\n  - optimizer: adamw\n  - _self_\n  - experiment: null\n  - env: local\nname: toy\n")
    write("optimizer/adamw.yaml", "kind: adamw\nlr: 1e-4\nbetas: [0.9, 0.999]\nfused: false\n")
    write("optimizer/came.yaml", "defaults:\n  - adamw\n  - _self_\nkind: came\n")
    write("env/local.yaml", "# @package _global_\nfolder: ${oc.env:SANA_TEST_OUT,out}/${name}\n")
    write("env/ci.yaml", "# @package _global_\nfolder: ci\noptimizer:\n  fused: true\n")
    write("experiment/base.yaml", "# @package _global_\ndefaults:\n  - override /optimizer: came\n  - _self_\nname: base\n")
    write("experiment/child.yaml", "# @package _global_\ndefaults:\n  - base\n  - _self_\nname: child\noptimizer:\n  lr: 2e-5\n")
    return tmp_path


def told(folder, *overrides: str, experiment: str = "child") -> str:
    with pytest.raises(ConfigError) as caught:
        validate(compose_experiment(experiment, overrides, folder), Toy)
    return str(caught.value)


def origins_of(composed) -> dict[str, str]:
    return {key: str(origin).rsplit("/", 1)[-1] for key, _, origin in composed.leaves()}


def test_an_experiment_inherits_and_every_value_knows_its_line(folder):
    composed = compose_experiment("child", config_dir=folder)
    toy = validate(composed, Toy)
    assert (toy.name, toy.optimizer.kind, toy.optimizer.lr) == ("child", "came", 2e-5)
    assert toy.optimizer.betas == (0.9, 0.999)
    assert origins_of(composed) == {
        "name": "child.yaml:5",
        "folder": "local.yaml:2",
        "optimizer.kind": "came.yaml:4",
        "optimizer.lr": "child.yaml:7",
        "optimizer.betas": "adamw.yaml:3",
        "optimizer.fused": "adamw.yaml:4",
    }


def test_an_environment_lies_over_the_experiment(folder):
    composed = compose_experiment("child", ["env=ci"], folder)
    assert validate(composed, Toy).optimizer.fused is True
    assert origins_of(composed)["optimizer.fused"] == "ci.yaml:4"
    assert origins_of(composed)["folder"] == "ci.yaml:2"


def test_interpolation_and_the_environment_variable_with_its_default(folder, monkeypatch):
    monkeypatch.delenv("SANA_TEST_OUT", raising=False)
    assert compose_experiment("child", config_dir=folder).values["folder"] == "out/child"
    monkeypatch.setenv("SANA_TEST_OUT", "/elsewhere")
    composed = compose_experiment("child", config_dir=folder)
    assert composed.values["folder"] == "/elsewhere/child"
    assert composed.origins.of(["folder"]).expression == "${oc.env:SANA_TEST_OUT,out}/${name}"


def test_the_command_line_beats_all(folder):
    composed = compose_experiment("child", ["optimizer.lr=3e-3", "env=ci", "optimizer.fused=false", "folder=x"], folder)
    assert validate(composed, Toy).optimizer == Optimizer(kind="came", lr=3e-3)
    typed = {key for key, origin in origins_of(composed).items() if origin == "command line"}
    assert typed == {"optimizer.lr", "optimizer.fused", "folder"}
    chosen = compose_experiment("child", ["optimizer=adamw"], folder)
    assert (chosen.values["optimizer"]["kind"], origins_of(chosen)["optimizer.kind"]) == ("adamw", "adamw.yaml:1")


def test_an_experiment_of_another_task_lies_over_that_tasks_file(folder):
    (folder / "train_toy.yaml").write_text(
        "defaults:\n  - optimizer: came\n  - _self_\n  - experiment: null\n  - env: local\nname: x\ntask: toy\nonly_here: 1\n"
    )
    (folder / "experiment" / "toy.yaml").write_text("# @package _global_\ntask: toy\nname: mine\n")
    (folder / "experiment" / "toy_child.yaml").write_text("# @package _global_\ndefaults:\n  - toy\n  - _self_\nname: child\n")
    (folder / "experiment" / "first.yaml").write_text("# @package _global_\ntask: transformer\nname: first\n")
    for name in ("toy", "toy_child"):
        composed = compose_experiment(name, config_dir=folder)
        assert (composed.values["task"], composed.values["only_here"], composed.values["optimizer"]["kind"]) == ("toy", 1, "came")
        assert origins_of(composed)["task"] == "toy.yaml:2"
    assert compose_experiment("first", config_dir=folder).values["optimizer"]["kind"] == "adamw"
    assert "task" not in compose_experiment("child", config_dir=folder).values
    assert "toy: task: got 'joy' (command line); expected that of the experiment's file, 'toy'" in told(
        folder, "task=joy", experiment="toy"
    )
    (folder / "experiment" / "wrong.yaml").write_text("# @package _global_\ntask: tox\n")
    assert "wrong: task: got 'tox'; did you mean 'toy'?" in told(folder, experiment="wrong")
    (folder / "experiment" / "circle.yaml").write_text("defaults:\n  - circle\n")
    assert "experiment/circle: inherits from itself" in told(folder, experiment="circle")


def test_overrides_can_add_and_remove(folder):
    composed = compose_experiment("child", ["+extra={a: 1, b: [2]}", "~optimizer.fused"], folder)
    assert composed.values["extra"] == {"a": 1, "b": [2]}
    assert "fused" not in composed.values["optimizer"]
    assert origins_of(composed)["extra.b"] == "command line"
    assert validate(compose_experiment("child", ["~optimizer.fused"], folder), Toy).optimizer.fused is False


def test_an_unknown_key_names_the_nearest_and_the_file(folder):
    (folder / "experiment" / "child.yaml").write_text("# @package _global_\nname: x\noptimizer:\n  lrate: 2\n  kind: came\n")
    message = told(folder)
    assert (
        "optimizer.lrate: unknown key; did you mean 'lr'? Valid: kind, lr, betas, fused" in message or "Valid: kind, lr" in message
    )
    assert "optimizer.lrate: unknown key" in message
    assert "experiment/child.yaml:4)" in message
    assert isinstance(ConfigError("x"), SpecError)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=fast", ["optimizer.lr: got 'fast'; expected a valid number (command line)"]),
        ("optimizer.lr='1'", ["optimizer.lr: got '1'; expected a valid number"]),
        ("optimizer.lr=-1", ["optimizer.lr: got -1; expected greater than 0 (command line)"]),
        ("optimizer.fused=1", ["optimizer.fused: got 1; expected a valid boolean"]),
        ("optimizer.kind=camel", ["optimizer.kind: got 'camel'; did you mean 'came'? Valid: adamw, came (command line)"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas.1: missing"]),
        ("~optimizer.kind", ["optimizer.kind: missing; give it on the command line as +optimizer.kind=…, or beside "]),
        ("optimizer.lrr=1", ["command line: optimizer.lrr=1: optimizer has no 'lrr'; did you mean 'lr'?", "+optimizer.lrr=1"]),
        ("optimzer.lr=1", ["the configuration has no 'optimzer'; did you mean 'optimizer'?"]),
        ("optimizer.lr.x=1", ["optimizer.lr has no 'x'"]),
        ("optimizer=cam", ["optimizer: got 'cam'; did you mean 'came'?", "Looked in "]),
        ("env=cloud", ["env: got 'cloud'", "Valid: ci, cluster, local"]),
        ("name=???", ["name (command line): Missing mandatory value", "name=…"]),
        ("name=${nowhere}", ["name (command line): Interpolation key 'nowhere' not found"]),
        ("name=${oc.env:SANA_TEST_NOT_SET}", ["Environment variable 'SANA_TEST_NOT_SET' not found"]),
        ("name=[", ["command line: name=[: ", "expected key=value, group=file"]),
        ("name=a,b", ["train: Ambiguous value"]),
        ("experiment=base", ["got a second experiment, after 'child'"]),
        ("=3", ["train: "]),
        ("name", ["command line: name: "]),
    ],
)
def test_a_mistake_on_the_command_line_is_said(folder, override, words):
    message = told(folder, override)
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_a_wrong_value_in_a_file_names_its_line(folder):
    (folder / "optimizer" / "adamw.yaml").write_text("kind: adamw\nlr: true\n")
    assert "optimizer.lr: got True; expected a valid number" in told(folder, experiment="base")
    assert "optimizer/adamw.yaml:2)" in told(folder, experiment="base")


@pytest.mark.parametrize(
    "text", ["name: [", "name: a\nname: b\n", "\tname: a", "defaults:\n  - nothing: here\n", "- 1\n", "a: \xff"]
)
def test_a_broken_file_is_an_error_of_ours(folder, text):
    (folder / "experiment" / "child.yaml").write_bytes(text.encode("latin-1"))
    assert told(folder)


def test_what_is_not_yaml_names_its_line(folder):
    (folder / "experiment" / "child.yaml").write_text("name: a\n\tname: a\n")
    assert "not YAML: found character" in told(folder)
    assert "experiment/child.yaml:2)" in told(folder)


def test_an_unknown_experiment_names_the_nearest(folder):
    assert "experiment: got 'chlid'; did you mean 'child'?" in told(folder, experiment="chlid")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("override /optimizer: cmae", "optimizer: got 'cmae'; did you mean 'came'?"),
        ("override /optimzer: came", "optimzer"),
        ("bse", "experiment: got 'bse'; did you mean 'base'?"),
    ],
)
def test_a_mistake_in_a_defaults_list_is_said(folder, line, words):
    (folder / "experiment" / "child.yaml").write_text(f"# @package _global_\ndefaults:\n  - {line}\n  - _self_\nname: x\n")
    assert words in told(folder)


@pytest.mark.parametrize("name", ["../train", "", "a b", "child,base", "child.yaml", "/etc/passwd"])
def test_what_is_no_name_of_an_experiment_is_refused(folder, name):
    assert told(folder, experiment=name)


def test_folders_are_searched_in_order(folder, tmp_path_factory, monkeypatch):
    second = tmp_path_factory.mktemp("it's a folder, {really}")
    (second / "experiment").mkdir()
    (second / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - child\n  - _self_\nname: mine\n")
    monkeypatch.setenv("SANA_CONFIG_DIR", str(second))
    composed = compose_experiment("mine", config_dir=folder)
    assert composed.values["optimizer"]["lr"] == 2e-5
    assert {"child", "mine", "sana_600m_1024px"} <= set(names_in_group("experiment", folder))
    composed = compose_experiment("sana_600m_512px", ["name=x"])  # the project's, with the variable's folder before it
    assert origins_of(composed)["data.resolution"].startswith("sana_600m_512px.yaml:")
    with pytest.raises(ConfigError, match="not a folder"):
        compose("train", config_dir=folder / "none")


def test_a_schedule_is_read_by_name(monkeypatch, tmp_path):
    assert load_schedule("sana_4k").recipe == load_schedule(CONFIGS / "schedule" / "sana_4k.yaml").recipe
    assert load_schedule("sana", num_steps=3).num_steps == 3
    with pytest.raises(ConfigError, match="schedule: got 'sana_4'; did you mean 'sana_4k'"):
        load_schedule("sana_4")
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "own.yaml").write_text("scheduler: flow_euler\nnum_stepz: 3\n")
    monkeypatch.setenv("SANA_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"schedule.num_stepz: unknown key; did you mean 'num_steps'.*own.yaml:2"):
        load_schedule("own")


def test_hydra_is_loaded_on_use():
    code = "import runtime, runtime.config, sys; print(*({'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stdout.strip()


def test_hydras_own_state_is_left_alone(folder):
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    compose_experiment("child", config_dir=folder)
    told(folder, "name=[")
    assert GlobalHydra.instance().hydra is before


names = st.sampled_from(["a", "b", "c"])
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(names, trees, min_size=1, max_size=3), min_size=1, max_size=4))
def test_the_last_that_says_a_value_is_its_origin(layers):
    """Against the merge itself: mappings merge, anything else replaces."""

    def merge(below, above):
        for key, value in above.items():
            if isinstance(value, dict) and value and isinstance(below.get(key), dict):
                merge(below[key], value)
            else:
                below[key] = json.loads(json.dumps(value))
        return below

    origins, merged, said = Origins(), {}, {}
    for number, layer in enumerate(layers):
        merge(merged, layer)
        for key, value in leaves(layer):
            origins.set(key, Origin(Path("layer.yaml"), number))
            said[key, json.dumps(value)] = number
    for key, value in leaves(merged):
        assert origins.of(key).line == said[key, json.dumps(value)]


words = st.text("abcxyz0189 ,=:[]{}()'\"éü*~+?", max_size=12)  # no $ and no backslash, which mean something in OmegaConf and Hydra


@pytest.mark.slow
@settings(max_examples=25)
@given(value=st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | words)
def test_any_scalar_can_come_from_the_command_line(value, tmp_path_factory):
    folder = _one_key(tmp_path_factory)
    text = json.dumps(value) if not isinstance(value, str) else "'" + value.replace("'", "\\'") + "'"
    assume(value != "???")  # a missing value, quoted or not
    composed = compose("one", [f"key={text}"], folder)
    assert composed.values["key"] == value
    assert str(composed.origins.of(["key"])) == "command line"


@pytest.mark.slow
@settings(max_examples=40)
@given(start=st.sampled_from(["", "key=", "+new=", "++key.a=", "~"]), rest=st.text("key=+~${}[],'\"\\:@/. 1?", max_size=8))
def test_any_override_composes_or_is_an_error_of_ours(start, rest, tmp_path_factory):
    with contextlib.suppress(ConfigError):
        compose("one", [start + rest], _one_key(tmp_path_factory))


def _one_key(factory) -> Path:
    folder = factory.getbasetemp() / "one"
    folder.mkdir(exist_ok=True)
    (folder / "one.yaml").write_text("key: 0\n")
    return folder
