import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cpp_bundles import letters_bundle
from cpp_pictures import onnxruntime_library
from cpp_trt import WORDS, Ran, write_engine

from engines.bundle import TensorRTInfo
from engines.digest import file_sha256
from engines.spec import COMPONENTS, Target
from runtime import SanaEngine


@pytest.fixture(scope="module")
def fake(cpp: Path) -> Path:
    """The folder with both libraries."""
    folder = cpp / "fake"
    if not (folder / "libtensorrt_rtx.so.1").exists():
        pytest.skip("set TENSORRT_ROOT to an SDK of TensorRT for RTX: the fake is built from its headers")
    return folder


@pytest.fixture(scope="module")
def engines(cpp: Path, fake: Path) -> Callable[[Callable[..., Path], Path], Path]:
    """A fake bundle with the fake's engines."""
    said = subprocess.run([cpp / "sana", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"RTX (\d+\.\d+)", said)
    assert version is not None
    built_by = TensorRTInfo(flavor="rtx", version=f"{version[1]}.0.0")

    def make(write: Callable[..., Path], folder: Path, levels: bool = True) -> Path:
        write(folder, targets=(Target.SM89,), tensorrt=built_by)
        path = folder / "manifest.json"
        document = json.loads(path.read_bytes())
        for component in COMPONENTS:
            name = write_engine(folder, component, Target.SM89, levels)
            document["files"][name] |= {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
        path.write_text(json.dumps(document))
        return folder

    return make


@pytest.fixture(scope="module")
def bundle(engines, tmp_path_factory) -> Path:
    return engines(letters_bundle, tmp_path_factory.mktemp("trt") / "b")


@pytest.fixture
def environment(fake: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "LD_LIBRARY_PATH": str(fake),
        "SANA_TENSORRT": str(fake / "libtensorrt_rtx.so.1"),
        "SANA_ONNXRUNTIME": str(onnxruntime_library()),
        "SANA_CACHE_DIR": str(tmp_path / "cache"),
        "FAKE_CUDA_SM": "89",
    }


@pytest.fixture
def sana(cpp: Path, environment: dict[str, str], bundle: Path, tmp_path: Path) -> Callable[..., Ran]:
    numbers = iter(range(100))

    def call(*arguments: object, command: tuple[str, ...] = ("sana", "generate"), of: Path = bundle, **changes: str) -> Ran:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        more = {**os.environ, **environment, "FAKE_GPU_LOG": str(folder / "log"), **changes}
        program, *words = command
        words += [str(of), *map(str, arguments), "--out", str(folder)] if words == ["generate"] else map(str, arguments)
        done = subprocess.run([cpp / program, *words], capture_output=True, text=True, env=more, check=False)
        return Ran(done, folder / "log")

    return call


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[bytes]:
    """Pictures of "a cat" in Python, of the seeds 3, 4, …"""
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        return [engine.generate("a cat", **(WORDS | {"seed": 3 + i}))[0].tobytes() for i in range(4)]
