"""A bundle end to end through TensorRT in C++ and in Python on a real GPU: identical pixels from the same engines and seed.

SANA_CPP_PROGRAM: the program, built elsewhere; else it is built here, which needs TENSORRT_ROOT. SANA_PLUGINS_LIBRARY:
libsana_plugins.so, likewise. SANA_TENSORRT: TensorRT's library; else that of the Python package. SANA_TEST_BUNDLE: a bundle with
engines for this GPU, as sana-tiny; else one with trivial graphs is built.
"""

import importlib.util
import json
import os
import subprocess
import warnings
from pathlib import Path

import cpp_build
import pytest
from cpp_pictures import flags

from engines import tensorrt
from engines.bundle import TensorRTInfo
from engines.digest import file_sha256
from engines.spec import COMPONENTS
from plugins import cublas_lt, native
from runtime import SanaEngine
from runtime.image import read_picture, save_png
from runtime.prompt import PromptCutWarning

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(tensorrt.current_target() is None, reason="needs a CUDA GPU"),
]
PROMPTS = ["a red apple on a yellow background", "two cats"]
CASES: list[dict[str, object]] = [{"seed": 7}, {"seed": 7, "guidance": 1.0, "steps": 4}, {"seed": 11, "scheduler": "flow_euler"}]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if built := os.environ.get("SANA_CPP_PROGRAM"):
        return Path(built).resolve()
    if not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("set TENSORRT_ROOT to an SDK, or SANA_CPP_PROGRAM to a program sana that was built elsewhere")
    return cpp_build.build(tmp_path_factory.mktemp("sana"), "sana") / "sana"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of the program: the libraries that Python uses."""
    found = {"SANA_CUBLASLT": ":".join(cublas_lt.paths()), "SANA_TENSORRT": os.environ.get("SANA_TENSORRT", "")}
    if not found["SANA_TENSORRT"]:
        spec = importlib.util.find_spec(f"{tensorrt.load().__name__}_libs")
        assert spec is not None
        (folder,) = spec.submodule_search_locations or ()
        name = "libtensorrt_rtx.so.1" if tensorrt.flavor() == "rtx" else f"libnvinfer.so.{tensorrt.version().split('.')[0]}"
        found["SANA_TENSORRT"] = str(Path(folder) / name)
    library = os.environ.get("SANA_PLUGINS_LIBRARY", "")
    if not library and os.environ.get("TENSORRT_ROOT"):
        folder = cpp_build.build(tmp_path_factory.mktemp("plugins"), source=REPOSITORY / "plugins" / "cpp")
        library = str(folder / "libsana_plugins.so")
    if library:
        found[native.VARIABLE] = library  # else the one beside the program
    return {name: value for name, value in os.environ.items() if name != native.VARIABLE} | found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    if named := os.environ.get("SANA_TEST_BUNDLE"):
        return Path(named).resolve()
    return trivial_bundle(tmp_path_factory.mktemp("gpu") / "bundle")


def trivial_bundle(out: Path) -> Path:
    from cpp_bundles import letters_bundle  # only here: a machine that has a bundle need not have onnx
    from trt_profiles import profiles

    target = tensorrt.current_target()
    assert target is not None
    built_by = TensorRTInfo(flavor=tensorrt.flavor(), version=tensorrt.version())
    letters_bundle(out, targets=(target,), tensorrt=built_by)
    path = out / "manifest.json"
    document = json.loads(path.read_bytes())
    for component in COMPONENTS:
        engine = out / component / f"{target}.engine"
        graph = out / component / "model.onnx"
        engine.write_bytes(tensorrt.build_engine(graph, profiles=profiles(component), targets=[target], expected_plugins={}))
        document["files"][f"{component}/{engine.name}"] |= {"sha256": file_sha256(engine), "size": engine.stat().st_size}
    path.write_text(json.dumps(document))
    return out


def draw(program: Path, bundle: Path, environment: dict[str, str], out: Path, *options: object) -> list[bytes]:
    """The pixels of each picture, in order; each prompt three times, so that one is captured and one is a graph again."""
    words = ["generate", bundle, *PROMPTS, "--count", 3, "--backend", "tensorrt", "--out", out, *options]
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "backend: tensorrt on " in done.stderr
    return [read_picture(path)[0].tobytes() for path in done.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_identical_pixels(program, environment, bundle, tmp_path, case) -> None:
    with SanaEngine(bundle, backend="tensorrt", kernel_cache=tmp_path / "kernels") as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCutWarning)
        prompts = [prompt for prompt in PROMPTS for _ in range(3)]
        expected = [
            engine.generate(prompt, **case | {"seed": case["seed"] + i})[0].tobytes()  # type: ignore[operator, arg-type]
            for i, prompt in enumerate(prompts)
        ]
    kernels = ["--kernel-cache", tmp_path / "kernels"]
    assert draw(program, bundle, environment, tmp_path / "graphs", *flags(case), *kernels) == expected
    assert draw(program, bundle, environment, tmp_path / "launches", *flags(case), *kernels, "--no-cuda-graphs") == expected
    assert draw(program, bundle, environment, tmp_path / "low", *flags(case), "--no-kernel-cache", "--low-memory") == expected


def test_kernels_are_shared_with_python(program, environment, bundle, tmp_path) -> None:
    """What C++ compiled, Python takes, and the other way round: nobody writes a file of his own beside it, or more into it."""
    if tensorrt.flavor() != "rtx":
        pytest.skip("only TensorRT for RTX compiles kernels where an engine runs")
    seen = []
    for number, by in enumerate(("cpp", "python", "cpp")):
        if by == "cpp":
            draw(program, bundle, environment, tmp_path / str(number), "--kernel-cache", tmp_path / "kernels")
        else:
            with SanaEngine(bundle, backend="tensorrt", kernel_cache=tmp_path / "kernels") as engine:
                engine.generate(PROMPTS[0])
        seen.append({path.name: path.stat().st_size for path in (tmp_path / "kernels").iterdir()})
    assert len(seen[0]) == len(COMPONENTS)
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_replay(program, environment, bundle, tmp_path) -> None:
    """C++ draws again what Python drew in a batch."""
    with SanaEngine(bundle, backend="tensorrt", kernel_cache=False) as engine:
        pictures = engine.generate(PROMPTS, seed=5)
    for number, picture in enumerate(pictures):
        path = save_png(picture, tmp_path / f"{number}.png")
        words = ["replay", path, "--bundle", bundle, "--no-kernel-cache"]
        done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "identical" in done.stdout
