"""The pictures of the C++ program beside those of Python."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import warnings
from pathlib import Path

from runtime import SanaEngine
from runtime.image import read_picture, save_png
from runtime.prompt import PromptCutWarning

PROMPTS = ["an apple on the left of a cat", "A HOUSE", "", "ein grüner Apfel, 猫"]


def onnxruntime_library() -> Path:
    """Beside the Python package, which need not be imported for it."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (found,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    return found


def run_program(cpp: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of the build, which is told where ONNX Runtime is."""
    environment = os.environ | {"SANA_ONNXRUNTIME": str(onnxruntime_library())}
    return subprocess.run([cpp / program, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False)


def flags(arguments: dict[str, object]) -> list[str]:
    names = {"negative_prompts": "negative"}
    return [word for name, value in arguments.items() for word in (f"--{names.get(name, name)}", str(value))]


def same_pictures(cpp: Path, bundle: Path, folder: Path, cases: list[dict[str, object]]) -> None:
    """Both draw PROMPTS with each of the cases: the same pixels, metadata and files; and Python draws those of C++ again."""
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        for number, case in enumerate(cases):
            out = folder / str(number)
            done = run_program(cpp, "sana", "generate", bundle, *PROMPTS, *flags(case), "--out", out)
            assert done.returncode == 0, done.stderr
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", PromptCutWarning)
                expected = engine.generate(PROMPTS, **case)
            # Python encodes all prompts and then all negative ones, C++ a picture's together
            said = sorted(line for line in done.stderr.splitlines() if "warning" in line)
            assert said == sorted(f"sana: warning: {each.message}" for each in caught)
            for path, picture in zip(map(Path, done.stdout.splitlines()), expected, strict=True):
                got, info = read_picture(path)
                assert got.tobytes() == picture.tobytes(), case
                theirs = json.loads(picture.info["sana"])
                ours = json.loads(got.info["sana"])
                assert ours.pop("program").startswith("libsana_runtime ")
                assert theirs.pop("program").startswith("sana-deploy ")
                assert ours == theirs
                # the same file, once it says the same
                picture.info["sana"] = got.info["sana"]
                assert save_png(picture, folder / "theirs.png").read_bytes() == path.read_bytes()
                assert engine.replay(info).tobytes() == picture.tobytes()
