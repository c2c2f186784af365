"""What runs in production is small: a picture is drawn where torch, triton, onnx and transformers cannot be imported at all."""

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import write_fake_bundle

BLOCK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} must not be imported here")

sys.meta_path.insert(0, Refuse())
"""
HEAVY = {"torch", "triton", "onnx", "transformers", "diffusers", "safetensors.torch"}


def run(code: str, *, blocked: set[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_picture_without_pytorch(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "fake")
    code = f"""
from runtime import SanaEngine
from runtime.image import read_picture, save_png
with SanaEngine({str(bundle.path)!r}) as engine:
    picture = engine.generate("a red apple", "blue", seed=3)[0]
    image, info = read_picture(save_png(picture, {str(tmp_path / "a.png")!r}))
    assert engine.replay(info).tobytes() == image.tobytes()
print(image.size, *sorted({HEAVY!r} & sys.modules.keys()))
"""
    assert run(code, blocked=HEAVY) == "(64, 64)\n"


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        # a training host has NumPy and tokenizers, and neither pydantic nor what draws
        ("runtime.noise", {"pydantic", "yaml", "tokenizers", "PIL", "onnxruntime", "cuda", "tensorrt_rtx", "rich"}),
        ("runtime.schedule", {"pydantic", "yaml", "tokenizers", "PIL", "onnxruntime", "cuda", "tensorrt_rtx", "rich"}),
        ("runtime.prompt", {"pydantic", "yaml", "PIL", "onnxruntime", "cuda", "tensorrt_rtx", "rich"}),
        ("runtime.engine", {"onnxruntime", "cuda", "tensorrt_rtx", "rich"}),  # these load when they are first used
        ("runtime.trt_backend", {"onnxruntime", "cuda", "tensorrt_rtx"}),
    ],
)
def test_modules_are_light(module: str, blocked: set[str]) -> None:
    run(f"import {module}", blocked=blocked | HEAVY)


def test_public_names() -> None:
    code = """
import runtime
assert not {"numpy", "pydantic", "PIL"} & sys.modules.keys()
print(runtime.__all__, runtime.SanaEngine.__module__, "SanaEngine" in dir(runtime))
try:
    runtime.SanaEngin
except AttributeError as error:
    print(error)
"""
    expected = "['SanaEngine'] runtime.engine True\nmodule 'runtime' has no attribute 'SanaEngin'\n"
    assert run(code, blocked=HEAVY) == expected
