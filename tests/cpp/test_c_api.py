"""sana.h: each class of error comes back as an error with Python's text, and nothing else comes out."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from cpp_bundles import letters_bundle
from cpp_pictures import run_program

from engines.digest import file_sha256
from engines.errors import SanaError
from runtime import SanaEngine
from runtime.image import read_picture, save_png
from runtime.schedule import load_schedule


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return letters_bundle(tmp_path_factory.mktemp("api") / "fake")


@pytest.fixture(scope="module")
def picture(bundle) -> Path:
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        return save_png(engine.generate("a cat", seed=7, steps=3)[0], bundle.parent / "cat.png")


@pytest.fixture
def api(cpp):
    """The kind and the message of a call; or, of a picture, its size with a sum of its pixels, and its info."""

    def call(*arguments: object) -> list[str]:
        done = run_program(cpp, "sana_api", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.rstrip("\n").split("\n", 1)

    return call


def python_says(folder: Path, act=lambda engine: engine.generate("a cat")) -> list[str]:
    with pytest.raises(SanaError) as caught, SanaEngine(folder, backend="onnxruntime") as engine:
        act(engine)
    return [type(caught.value).__name__, str(caught.value)]


def test_a_picture(api, bundle, picture):
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        pixels = engine.generate("a cat", seed=7, steps=3)[0].tobytes()
    total = 0
    for each in pixels:
        total = (total * 31 + each) % (1 << 64)
    size = f"{read_picture(picture)[0].width}x{read_picture(picture)[0].height} {total}"
    generated = api("generate", bundle, "seed", 7, "steps", 3)
    assert generated[0] == size
    assert api("replay", bundle, "info", generated[1])[0] == size
    assert api("read", picture) == [size, read_picture(picture)[0].info["sana"]]


def test_errors_of_bundles(api, bundle, tmp_path):
    def spoilt(name: str, file: str, data: bytes, *, listed: bool = False) -> Path:
        folder = tmp_path / name
        shutil.copytree(bundle, folder)
        (folder / file).write_bytes(data)
        if listed:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            manifest["files"][file] |= {"sha256": file_sha256(folder / file), "size": len(data)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    manifest = (bundle / "manifest.json").read_bytes()
    tokenizer = (bundle / "tokenizer" / "tokenizer.json").read_bytes()
    kinds = []
    for folder in (
        tmp_path / "none",
        spoilt("manifest", "manifest.json", manifest[:-5]),
        spoilt("schema", "manifest.json", manifest.replace(b'"schema_version": 2', b'"schema_version": 9')),
        spoilt("unsafe", "manifest.json", manifest.replace(b'"parity.json"', b'"../parity.json"')),
        spoilt("digest", "tokenizer/tokenizer.json", tokenizer.replace(b"<eos>", b"<eso>")),
        spoilt("checkpoint", "tokenizer/tokenizer.json", tokenizer.replace(b"<pad>", b"<dap>"), listed=True),
        spoilt("graph", "decoder/model.onnx", b"\x08\x0a", listed=True),
    ):
        said = python_says(folder)
        assert api("generate", folder) == said
        kinds.append(said[0])
    expected = ["MissingFile", "Manifest", "SchemaVersion", "UnsafePath", "Digest", "Checkpoint", "Bundle"]
    assert kinds == [f"{kind}Error" for kind in expected]


def test_errors_of_requests(api, bundle, picture, tmp_path):
    schedule = tmp_path / "x.yaml"
    schedule.write_text("scheduler: flow_euler\nnum_step: 3\n")
    text = read_picture(picture)[0].info["sana"]
    generate = partial(api, "generate", bundle)
    for arguments in ({"steps": -1}, {"width": 33}, {"guidance": 200.0}, {"scheduler": "flow_eular"}):
        said = python_says(bundle, lambda engine, given=arguments: engine.generate("a cat", **given))
        assert generate(*(word for pair in arguments.items() for word in pair)) == said
        assert said[0] == "RequestError"
    with pytest.raises(SanaError) as caught:
        load_schedule(schedule)
    assert generate("schedule_file", schedule) == ["SpecError", str(caught.value)]
    assert generate("cancel_at", 2) == ["Cancelled", f"cancelled after step 2 of {steps_of(bundle)}."]
    assert generate("cancelled", 1) == ["Cancelled", "cancelled before it began."]
    assert api("replay", bundle, "info", text, "cancelled", 1) == ["Cancelled", "cancelled before it began."]
    assert generate("out", tmp_path / "x.jpg")[0] == "RequestError"
    assert generate("out", "/proc/none/x.png")[0] == "SanaError"
    assert generate("library", tmp_path / "none.so")[0] == "SanaError"
    assert api("open", bundle, "backend", "tensort")[0] == "RequestError"
    assert api("replay", bundle, "info", "{")[0] == "ManifestError"
    assert api("replay", bundle, "info", text.replace('"bundle_digest":"', '"bundle_digest":"0')[: len(text)])[0] == "ManifestError"
    assert api("read", tmp_path / "none.png")[0] == "RequestError"
    said = python_says(bundle, lambda engine: engine.apply_lora("x.safetensors", 0.5))
    assert api("lora", bundle, "info", "x.safetensors") == said


def steps_of(bundle: Path) -> int:
    return json.loads((bundle / "manifest.json").read_bytes())["schedule"]["num_inference_steps"]


def test_nothing_where_something_is_expected(api, bundle):
    lines = "\n".join(api("nulls", bundle)).splitlines()
    assert lines.count("RequestError") == 13
    assert lines.count("1") == 3
    assert not {"ok", "0"} & set(lines)
    for words in ("bundle", "out", "engine", "path", "picture", "prompts"):
        assert f"{words}: got NULL; expected a pointer." in lines
    assert sum("struct_size: got " in line for line in lines) == 2


def test_no_memory(cpp, bundle, picture, tmp_path):
    done = subprocess.run([cpp / "sana_no_memory", bundle, picture, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    counts = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    assert set(counts) == {"open", "generate", "replay", "read", "save", "lora", "nothing"}
    assert min(counts.values()) >= 1
    assert counts["open"] > 1000
