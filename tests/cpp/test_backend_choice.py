"""Which backend the C++ runtime takes, and why, in Python's words; a fake CUDA driver says what GPU there is."""

import shutil
import subprocess
from pathlib import Path

import fakes
import pytest
from cpp_pictures import run_program

from engines import gpu
from engines.bundle import Bundle
from engines.errors import ArchitectureError, NoGpuError
from engines.spec import COMPONENTS, Target

TOKENIZER = Path(__file__).parents[2] / "models" / "sana-tiny" / "tokenizer" / "tokenizer.json"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """With a tokenizer that the C++ runtime reads: it is opened, and what it draws is of no interest here."""

    def save_tokenizer(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TOKENIZER, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "save_fake_tokenizer", save_tokenizer)
        return fakes.write_fake_bundle(tmp_path_factory.mktemp("bundles") / "b", targets=(Target.SM80, Target.SM89))


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory) -> Path:
    """A folder with a libcuda.so.1."""
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.fixture
def generate(cpp, bundle, tmp_path, monkeypatch):
    def call(backend: str, **environment: str) -> str:
        """What the program says on stderr."""
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        out = tmp_path / "out.png"
        return run_program(cpp, "sana", "generate", bundle.path, "a cat", "--backend", backend, "--out", out, "--steps", 1).stderr

    return call


def expected(kind: type[Exception], call, *arguments) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


def architecture_error(bundle: Bundle, sm: str) -> str:
    return expected(ArchitectureError, bundle.require_engine, COMPONENTS[0], sm)


def too_old() -> str:
    info = gpu.DeviceInfo(name="NVIDIA Fake", capability=(7, 5), memory_bytes=0, driver_cuda="13.0")
    return expected(NoGpuError, gpu._checked, info)


class Driver:
    """What cuda.bindings.driver answers where the fake library answers the same."""

    def __init__(self, code: int) -> None:
        self.code = code

    def cuInit(self, flags: int) -> tuple[int]:
        return (self.code,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return (0, 0)

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:
        return (0, b"CUDA_ERROR_OF_SOME_KIND")


def test_no_driver(generate):
    if gpu.current_target() is not None:
        pytest.skip("says what happens where there is no driver")
    assert "error: got no NVIDIA driver library (libcuda.so.1:" in generate("tensorrt")
    assert "because TensorRT has nothing to run on: got no NVIDIA driver library" in generate("auto")


@pytest.mark.parametrize("code", [0, 100, 803])
def test_no_gpu(generate, fake_cuda, monkeypatch, code):
    monkeypatch.setattr(gpu, "_driver", lambda: Driver(code))
    message = expected(NoGpuError, gpu.device_info)
    environment = {"LD_LIBRARY_PATH": str(fake_cuda), "FAKE_CUDA_BREAKS": "cuInit", "FAKE_CUDA_CODE": str(code)}
    assert f"sana: error: {message}\n" in generate("tensorrt", **environment)
    assert f"because TensorRT has nothing to run on: {message}\n" in generate("auto", **environment)


def test_a_gpu_that_is_too_old(generate, fake_cuda):
    environment = {"LD_LIBRARY_PATH": str(fake_cuda), "FAKE_CUDA_SM": "75"}
    assert f"sana: error: {too_old()}\n" in generate("tensorrt", **environment)
    assert f"because TensorRT has nothing to run on: {too_old()}\n" in generate("auto", **environment)


def test_a_gpu_without_an_engine(generate, fake_cuda, bundle):
    message = architecture_error(bundle, "sm86")
    environment = {"LD_LIBRARY_PATH": str(fake_cuda), "FAKE_CUDA_SM": "86"}
    assert f"sana: error: {message}\n" in generate("tensorrt", **environment)
    assert f"because TensorRT cannot run this bundle here: {message}\n" in generate("auto", **environment)


def test_a_gpu_with_an_engine_of_the_one_component(cpp, fake_cuda, bundle, tmp_path, monkeypatch):
    """What development builds: it has all its engines for this GPU."""
    alone = fakes.only("decoder", bundle.path, tmp_path / "decoder")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_cuda))
    monkeypatch.setenv("SANA_TENSORRT", str(fake_cuda / "none.so"))
    for sm, refused in (("89", False), ("86", True)):
        monkeypatch.setenv("FAKE_CUDA_SM", sm)
        words = ["generate", alone, "a cat", "--backend", "tensorrt", "--out", tmp_path / "out.png"]
        said = run_program(cpp, "sana", *words).stderr
        assert (f"this GPU is sm{sm}, and the bundle has engines for sm80, sm89" in said) == refused
        assert "error: " in said


def test_a_gpu_with_engines(cpp, generate, fake_cuda):
    """Without TensorRT's headers, and with them where its library is not there."""
    said = subprocess.run([cpp / "sana", "--version"], capture_output=True, text=True, check=True).stdout
    message = "this libsana_runtime was built without TensorRT. Build it" if "without TensorRT" in said else "got no TensorRT ("
    environment = {"LD_LIBRARY_PATH": str(fake_cuda), "FAKE_CUDA_SM": "89", "SANA_TENSORRT": str(fake_cuda / "none.so")}
    assert f"error: {message}" in generate("tensorrt", **environment)
    assert f"because TensorRT cannot run this bundle here: {message}" in generate("auto", **environment)
