"""The C++ program draws the pictures that Python draws: the same bytes from the same bundle and seed, through ONNX Runtime."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from cpp_bundles import letters_bundle, sprint_bundle
from cpp_pictures import flags, run_program, same_pictures
from fakes import HOST_TABLE
from PIL import Image

from engines.errors import BundleError, SanaError
from runtime import SanaEngine

CUT = pytest.mark.filterwarnings("ignore::runtime.prompt.PromptCutWarning")  # when Python draws a picture again


@pytest.fixture(scope="module")
def run(cpp):
    return partial(run_program, cpp)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return letters_bundle(tmp_path_factory.mktemp("cpp") / "fake")


@pytest.fixture(scope="module")
def sprint(tmp_path_factory) -> Path:
    return sprint_bundle(tmp_path_factory.mktemp("cpp") / "sprint")


@CUT
def test_same_pictures(cpp, bundle, tmp_path):
    cases: list[dict[str, object]] = [
        {},
        {"seed": 7, "steps": 3, "width": 96, "height": 32},
        {"seed": 2**64 - 4, "guidance": 1.0, "scheduler": "flow_dpm_solver", "steps": 9, "width": 128, "height": 128},
        {"guidance": 7.25, "negative_prompts": "a dog"},
    ]
    same_pictures(cpp, bundle, tmp_path, cases)


@CUT
def test_same_pictures_of_a_table_on_the_host(cpp, tmp_path):
    """And the same words for a token that the table has not."""
    same_pictures(cpp, letters_bundle(tmp_path / "host", **HOST_TABLE), tmp_path, [{"seed": 3, "steps": 2}, {"guidance": 1.0}])
    short = letters_bundle(tmp_path / "short", **HOST_TABLE | {"token_table_rows": 8})
    done = run_program(cpp, "sana", "generate", short, "a cat", "--out", tmp_path / "none")
    with SanaEngine(short) as engine, pytest.raises(BundleError, match=r"got the token \d+; expected 0 to 7") as caught:
        engine.generate("a cat")
    assert done.returncode == 2
    assert str(caught.value) in done.stderr


@CUT
def test_same_pictures_of_sprint(cpp, sprint, tmp_path):
    same_pictures(cpp, sprint, tmp_path, [{"seed": 3}, {"steps": 1}, {"steps": 2, "guidance": 3.0}])


def refresh(folder: Path, name: str) -> None:
    """Write the file's digest into the manifest."""
    from engines.digest import file_sha256

    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    document["files"][name] |= {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
    path.write_text(json.dumps(document))


BAD = [
    {"steps": 0},
    {"steps": 1001},
    {"guidance": -0.5},
    {"guidance": 101.0},
    {"guidance": float("nan")},
    {"guidance": 0.5, "negative_prompts": "a dog"},
    {"width": 31},
    {"width": 100},
    {"height": 4096},
    {"scheduler": "scm"},
    {"scheduler": "flow_eular"},
]


def test_bad_requests(run, bundle, tmp_path):
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        for case in BAD:
            with pytest.raises(SanaError) as caught:
                engine.generate(["a"], **case)
            done = run("sana", "generate", bundle, "a", *flags(case), "--out", tmp_path / "x.png")
            assert done.returncode == 2
            assert done.stderr.splitlines()[-1] == f"sana: error: {caught.value}"
        for prompt in ("x" * 100_001,):
            with pytest.raises(SanaError) as caught:
                engine.generate([prompt])
            assert run("sana", "generate", bundle, prompt).stderr.splitlines()[-1] == f"sana: error: {caught.value}"
    assert not (tmp_path / "x.png").exists()


def test_bad_bundles(run, bundle, tmp_path):
    def refused(folder: Path, *arguments: str) -> str:
        done = run("sana", "generate", folder, "a", "--out", tmp_path / "x.png", *arguments)
        assert done.returncode == 2, done.stderr
        return done.stderr.splitlines()[-1]

    def python_says(folder: Path) -> str:
        with pytest.raises(SanaError) as caught, SanaEngine(folder, backend="onnxruntime") as engine:
            engine.generate("a")
        return f"sana: error: {caught.value}"

    assert refused(tmp_path / "none") == python_says(tmp_path / "none")
    for file in ("tokenizer/tokenizer.json", "decoder/model.onnx.data"):
        folder = tmp_path / file.replace("/", "-")
        shutil.copytree(bundle, folder)
        data = bytearray((folder / file).read_bytes())
        data[-1] ^= 1
        (folder / file).write_bytes(data)
        assert refused(folder) == python_says(folder)
    folder = tmp_path / "no-graph"
    shutil.copytree(bundle, folder)
    (folder / "decoder" / "model.onnx").write_bytes(b"\x08\x0a")  # ONNX, with nothing in it
    refresh(folder, "decoder/model.onnx")
    assert refused(folder) == python_says(folder)


def test_an_onnxruntime_that_is_not_there(cpp, bundle, tmp_path):
    environment = os.environ | {"SANA_ONNXRUNTIME": str(tmp_path / "none.so")}
    done = subprocess.run([cpp / "sana", "generate", bundle, "a"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "ONNX Runtime: cannot be loaded" in done.stderr
    assert "Set SANA_ONNXRUNTIME" in done.stderr


def test_c_program(run, bundle, tmp_path):
    """Through sana.h: sizes and steps of its own, a callback that sees each step, and one that ends the request."""
    folder = tmp_path / "c"
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "manifest.json").read_bytes())
    document["ranges"] |= {"max_side": 256}
    (folder / "manifest.json").write_text(json.dumps(document))
    done = run("sana_example", folder, "a cat", 9, tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == [f"step {i} of 3" for i in (1, 2, 3)]
    with SanaEngine(folder, backend="onnxruntime") as engine:
        expected = engine.generate("a cat", seed=9, steps=3, width=256, height=256)[0]
    assert Image.open(tmp_path / "c.png").tobytes() == expected.tobytes()
    cancelled = run("sana_example", folder, "a cat", 9, tmp_path / "none.png", 2)
    assert cancelled.returncode == 1
    assert cancelled.stderr.splitlines()[2:] == ["Cancelled: cancelled after step 2 of 3."]
    assert not (tmp_path / "none.png").exists()
    refused = run("sana_example", tmp_path / "nothing", "a cat", 9, tmp_path / "none.png")
    assert refused.stderr.startswith("MissingFileError: ")
