"""The wheel carries configs/, where runtime.config looks for it."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What a wheel of this checkout holds. Made in a copy, because setuptools writes beside the sources; nothing is downloaded."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        name = pattern.rstrip("*")
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def test_it_has_every_configuration(installed):
    here, there = ({file.relative_to(root) for file in root.rglob("*.yaml")} for root in (ROOT / "configs", installed / "configs"))
    assert here == there


def test_it_has_no_tests(installed):
    assert not (installed / "tests").exists()


@pytest.mark.parametrize("name", ["build", "runtime", "sana_600m_512px"])
def test_configurations_are_found_where_there_is_no_checkout(installed, name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from apps.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "config", "show", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{installed}/configs/" in done.stdout
