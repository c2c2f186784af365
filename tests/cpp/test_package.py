"""What `cmake --install` gives is enough for the programs of docs/embedding.md, by CMake and by pkg-config."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_bundles import letters_bundle
from cpp_pictures import onnxruntime_library

from runtime import SanaEngine
from runtime.image import read_picture

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | environment, check=False)


def done(*command: object, **environment: str) -> str:
    finished = run(*command, **environment)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The programs of the page, as files."""
    folder = tmp_path_factory.mktemp("sources")
    for language, name in (("cpp", "example_cpp.cpp"), ("c", "example_c.c")):
        (program,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
        assert len(program.splitlines()) <= 30
        (folder / name).write_text(program)
    shutil.copy(ROOT / "tests" / "cpp" / "package" / "CMakeLists.txt", folder)
    return folder


@pytest.fixture(scope="module")
def prefix(cpp, tmp_path_factory) -> Path:
    """Installed, and then moved."""
    if "SANA_CPP_SANITIZE" in os.environ:
        pytest.skip("programs of others are not compiled for sanitizers")
    folder = tmp_path_factory.mktemp("prefix")
    done("cmake", "--install", cpp, "--prefix", folder / "first")
    return (folder / "first").rename(folder / "usr")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, bytes]:
    """A bundle, and the pixels of its picture of the page's seed."""
    bundle = letters_bundle(tmp_path_factory.mktemp("embedding") / "fake")
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        return bundle, engine.generate("a cat", seed=7)[0].tobytes()


def check_programs(folder: Path, drawn: tuple[Path, bytes], tmp_path: Path, **environment: str) -> None:
    bundle, pixels = drawn
    environment["SANA_ONNXRUNTIME"] = str(onnxruntime_library())
    for name in ("example_c", "example_cpp"):
        out = tmp_path / f"{name}.png"
        assert done(folder / name, bundle, "a cat", out, **environment) == f"{out}\n"
        assert read_picture(out)[0].tobytes() == pixels
        failed = run(folder / name, tmp_path / "nothing", "a cat", out, **environment)
        assert failed.returncode == 1
        assert failed.stderr.startswith("MissingFileError: ")


def test_what_is_installed(prefix):
    names = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if not path.is_dir()}
    (library,) = [name for name in names if name.endswith("libsana_runtime.so.0.1.0")]
    libraries = library.rpartition("/")[0]
    headers = {"include/sana.h", "include/sana/engine.hpp", "include/sana/error.hpp", "include/sana/export.h"}
    assert {"bin/sana", f"{libraries}/libsana_runtime.so", f"{libraries}/libsana_runtime.so.1", *headers} <= names
    assert {name for name in names if name.startswith("include/")} == headers
    assert "SONAME" in done("objdump", "-p", prefix / library)
    assert re.search(r"SONAME +libsana_runtime\.so\.1\n", done("objdump", "-p", prefix / library))
    shown = {line.split()[-1] for line in done("nm", "-DC", "--defined-only", prefix / library).splitlines() if " T " in line}
    assert {name for name in shown if name.startswith("sana_")} == set(
        re.findall(r"\b(sana_\w+)\(", (ROOT / "runtime" / "cpp" / "include" / "sana.h").read_text())
    )
    assert done(prefix / "bin" / "sana", "--version").startswith("sana 0.1.0 ")


def test_find_package(prefix, sources, drawn, tmp_path):
    done("cmake", "-S", sources, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    done("cmake", "--build", tmp_path / "build")
    check_programs(tmp_path / "build", drawn, tmp_path)
    newer = (sources / "CMakeLists.txt").read_text().replace("sana_runtime 0.1", "sana_runtime 0.2")
    shutil.copytree(sources, tmp_path / "newer")
    (tmp_path / "newer" / "CMakeLists.txt").write_text(newer)
    refused = run("cmake", "-S", tmp_path / "newer", "-B", tmp_path / "none", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert refused.returncode != 0
    assert "version: 0.1.0" in refused.stderr


def test_pkg_config(prefix, sources, drawn, tmp_path):
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    (pc,) = prefix.rglob("sana_runtime.pc")
    flags = done("pkg-config", "--cflags", "--libs", "sana_runtime", PKG_CONFIG_PATH=str(pc.parent)).split()
    assert done("pkg-config", "--modversion", "sana_runtime", PKG_CONFIG_PATH=str(pc.parent)).strip() == "0.1.0"
    done("cc", "-std=c99", "-Wall", "-Werror", sources / "example_c.c", "-o", tmp_path / "example_c", *flags)
    done("c++", "-std=c++20", "-Wall", "-Werror", sources / "example_cpp.cpp", "-o", tmp_path / "example_cpp", *flags)
    check_programs(tmp_path, drawn, tmp_path, LD_LIBRARY_PATH=str(pc.parents[1]))


@pytest.mark.slow
def test_headers_of_tensorrt_that_are_not_there(tmp_path):
    """Where a folder was named that has none, that is an error; where none was, it is said, and what needs them is left out."""
    source = ["cmake", "-S", ROOT / "runtime" / "cpp", "-B"]
    named = run(*source, tmp_path / "named", f"-DSANA_TENSORRT_ROOT={tmp_path}")
    assert named.returncode != 0
    said = " ".join(named.stderr.split())
    assert (
        f"TensorRT: got {tmp_path}, which has no include/NvInferRuntime.h; expected the folder of a TensorRT or TensorRT for RTX"
        in said
    )
    hidden = f"-DCMAKE_IGNORE_PATH={';'.join(str(path.parent) for path in Path('/usr').glob('include/**/NvInferRuntime.h'))}"
    without = done(*source, tmp_path / "without", "-DSANA_TENSORRT_ROOT=", hidden)
    assert "TensorRT headers: none found, so what needs them is left out. Set TENSORRT_ROOT" in without
