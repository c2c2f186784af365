"""What SanaEngine(verify=True) promises: each file that its backend opens is the one that was written, and it opens no other."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from fake_tensorrt import fake_backend

import runtime.trt_backend
from engines.bundle import Bundle
from engines.errors import BundleError, DigestError, MissingFileError
from runtime import SanaEngine

REQUEST = {"steps": 1, "width": 32, "height": 32}
TOKENIZER = "tokenizer/tokenizer.json"


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", functools.partial(fake_backend))


def opened_files(folder: Path, backend: str) -> set[str]:
    with SanaEngine(folder, backend=backend) as engine:
        return {TOKENIZER, *engine._backend.files()}  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_a_flipped_bit_in_a_file_that_is_opened_is_refused(folder: Path, backend: str) -> None:
    names = json.loads((folder / "manifest.json").read_bytes())["files"]
    opened = opened_files(folder, backend)
    assert opened < set(names)
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if name in opened:
            with pytest.raises(BundleError, match=r"was changed|not an ONNX file"):
                SanaEngine(folder, backend=backend)
        elif not name.endswith(".onnx"):  # graphs are walked when a bundle is opened, by whatever backend
            SanaEngine(folder, backend=backend).close()
        with pytest.raises(BundleError):
            Bundle.open(folder)
        (folder / name).write_bytes(data)


def test_onnxruntime_opens_only_what_was_compared(folder: Path) -> None:
    opened = opened_files(folder, "onnxruntime")
    assert opened == {TOKENIZER} | {
        f"{c}/model.onnx{end}" for c in Bundle.open(folder).manifest.components for end in ("", ".data")
    }
    with SanaEngine(folder, backend="onnxruntime") as engine:
        for path in [each for each in folder.rglob("*") if each.is_file() and str(each.relative_to(folder)) not in opened]:
            path.unlink()
        assert engine.generate("a cat", **REQUEST)


def test_tensorrt_opens_engines_alone(folder: Path) -> None:
    names = json.loads((folder / "manifest.json").read_bytes())["files"]
    assert opened_files(folder, "tensorrt") == {TOKENIZER} | {name for name in names if name.endswith(".engine")}


def test_nothing_is_opened_before_it_was_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (folder / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(b"?" * len(data))
    closed = []
    monkeypatch.setattr(runtime.trt_backend.TensorRTBackend, "close", lambda self: closed.append(self))
    with pytest.raises(DigestError, match=r"tokenizer\.json was changed"):
        SanaEngine(folder, backend="tensorrt")
    assert len(closed) == 1


def test_without_verify_a_changed_byte_passes(folder: Path) -> None:
    name = next(name for name in opened_files(folder, "tensorrt") if name.endswith(".engine"))
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    SanaEngine(folder, backend="tensorrt", verify=False).close()


def test_a_bundle_that_goes_away_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(folder)
    monkeypatch.setattr(Bundle, "file", lambda self, name: folder / "gone")
    with pytest.raises(MissingFileError, match="replaced while it was read"):
        bundle.verify()
