"""The schema of training, and that every experiment and every group's file fits it."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from runtime.config import CONFIGS, ConfigError, compose_experiment, names_in_group
from runtime.config_origins import leaves
from sana_ref.transformer import SanaTransformerConfig
from sana_ref.variants import VARIANTS
from train.schema import ExperimentSettings, TransformerSettings, VariantName, load, main, transformer_config

cached = functools.cache(load)  # of names alone
ROOT = Path(__file__).parents[2]
OTHERS = {  # by task; each has tests of its own
    "autoencoder": ["sana_tiny_dcae", "dcae_phase2_1024px", "dcae_lite"],
}
EXPERIMENTS = [name for name in names_in_group("experiment") if name.startswith("sana_") and not name.startswith("sana_tiny")]
FLOW = [name for name, variant in VARIANTS.items() if variant.flow_shift is not None]  # Sprint is distilled, not trained so


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_fits(name):
    settings = cached(name)
    variant = VARIANTS[settings.model.variant]
    assert settings.name == name
    assert settings.data.resolution == variant.side
    assert settings.schedule.flow_shift == variant.flow_shift
    assert settings.trainer.batch % settings.trainer.micro_batch == 0
    assert settings.trainer.folder == settings.env.out / name
    assert transformer_config(settings.model) == variant.transformer
    ExperimentSettings.model_validate_json(settings.model_dump_json())  # what a checkpoint keeps


def test_the_example_of_the_documentation(tmp_path):
    text = (ROOT / "docs" / "config.md").read_text().split("```yaml\n# mine/experiment/forest.yaml\n")[1].split("```")[0]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "forest.yaml").write_text(text)
    settings = load("forest", config_dir=tmp_path)
    assert (settings.trainer.optimizer.kind, settings.data.path) == ("adamw", Path("/data/forest"))
    assert settings.trainer.folder == Path("out/train/forest")


@pytest.mark.slow
def test_every_published_size_has_an_experiment():
    assert set(FLOW) <= {cached(name).model.variant for name in EXPERIMENTS}


@pytest.mark.parametrize("env", ["local", "cluster", "ci"])
def test_environments(env, monkeypatch):
    for name in ("SANA_DATA", "SANA_OUT"):
        monkeypatch.delenv(name, raising=False)
    settings = load("sana_1600m_4kpx", [f"env={env}"])
    assert settings.env.name == env
    assert (settings.trainer.steps == 2) == (env == "ci")
    monkeypatch.setenv("SANA_DATA", "/some/where")
    assert load("sana_1600m_4kpx", [f"env={env}"]).data.path == Path("/some/where")


GROUPS = {
    group: names_in_group(group)
    for group in ("model", "data", "optimizer", "lr_schedule", "objective", "parallel", "trainer", "schedule")
}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [(group, name) for group, there in GROUPS.items() for name in there])
def test_every_choice_of_a_group_fits(group, name):
    load("sana_1600m_1024px", [f"{group}={name}"])


def test_the_names_of_variants_are_those_of_the_reference():
    assert get_args(VariantName) == tuple(VARIANTS)


def test_the_fields_of_a_transformer_are_those_of_the_reference():
    assert SanaTransformerConfig(**TransformerSettings().model_dump()) == SanaTransformerConfig()
    assert set(TransformerSettings.model_fields) == {field.name for field in dataclasses.fields(SanaTransformerConfig)}


def test_a_transformer_of_ones_own():
    own = load("sana_600m_512px", ["model.variant=null", "model.transformer={num_layers: 3}"]).model
    assert transformer_config(own) == SanaTransformerConfig(num_layers=3)
    with pytest.raises(ConfigError, match="num_layer: unknown key; did you mean 'num_layers'"):
        load("sana_600m_512px", ["model.variant=null", "model.transformer={num_layer: 3}"])
    with pytest.raises(ConfigError, match="got both of variant and transformer"):
        load("sana_600m_512px", ["model.transformer={num_layers: 3}"])


def _keys(model: type[BaseModel], above: tuple[str, ...] = ()):
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, (*above, name))
        else:
            yield (*above, name)


def test_every_key_of_the_schema_is_written_in_a_file():
    """So that it can be seen by `sana config show`, and set from the command line without a +."""
    written = {key for key, _ in leaves(compose_experiment("sana_600m_1024px").values)}
    expected = [key for key in _keys(ExperimentSettings) if key[0] != "schedule"]  # a sampler's keys depend on which it is
    assert [key for key in expected if not any(k[: len(key)] == key for k in written)] == []


@pytest.mark.slow
def test_the_recipes_of_the_papers():
    small, large = cached("sana_600m_512px"), cached("sana_1_5_1600m_1024px_fsdp")
    assert (small.trainer.optimizer.kind, small.trainer.optimizer.lr, small.trainer.micro_batch) == ("came", 1e-4, 128)
    assert (small.trainer.schedule.warm_up_steps, small.trainer.clip, small.trainer.max_non_finite) == (2000, 0.1, 20)
    assert (large.trainer.optimizer.kind, large.trainer.optimizer.eps, large.parallel.strategy) == ("adamw", 1e-10, "fsdp2")
    assert (large.trainer.optimizer.lr, large.trainer.schedule.warm_up_steps, large.trainer.micro_batch) == (2e-5, 1000, 32)
    assert [cached(f"sana_1600m_{side}").objective.flow_shift for side in ("1024px", "2kpx", "4kpx")] == [3.0, 3.0, 6.0]


@pytest.mark.slow
def test_the_program(capsys):
    assert main(["sana_600m_512px", "trainer.steps=3"]) == 0
    assert main(["sana_600m_512px", "trainer.optimizer.kind=adam"]) == 2
    assert "did you mean 'adamw'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in OTHERS.items() for name in names])
def test_experiments_of_other_tasks_are_checked_and_not_mistaken(task, name, capsys):
    assert main([name]) == 0
    assert main([name, "trainer.steps=0"]) == 2
    assert "trainer.steps: got 0; expected greater than or equal to 1 (command line)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"{name}: task: got '{task}' .*expected an experiment of a transformer"):
        load(name)


def test_checking_needs_no_pytorch():
    code = "import sys, train.schema; train.schema.load('sana_600m_512px'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_configs_hold_yaml_only():
    files = [path for path in CONFIGS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml"}
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in files)
