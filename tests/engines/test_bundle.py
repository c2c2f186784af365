"""Each way in which a bundle can be wrong has its own error, which says what was got, what was expected, and what to do."""

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from fakes import write_fake_bundle

from engines.bundle import Bundle
from engines.errors import (
    ArchitectureError,
    BundleError,
    DigestError,
    ManifestError,
    MissingFileError,
    SchemaVersionError,
    TensorRTVersionError,
    UnsafePathError,
)
from engines.spec import Target

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "digests.json").read_bytes())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_fake_bundle(
        tmp_path_factory.mktemp("bundle") / "b", targets=(Target.SM80, Target.SM89), tensorrt_version="1.7.1.116"
    ).path


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "b"))


def edit_manifest(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(document | changes))


def test_a_good_bundle_opens(pristine):
    done = []
    bundle = Bundle.open(pristine, progress=lambda num_bytes, total: done.append((num_bytes, total)))
    assert bundle.manifest.components == ("text_encoder", "text_projection", "denoiser", "decoder")
    assert bundle.onnx_path("denoiser").read_bytes()
    assert bundle.engine_path("denoiser", "sm89").name == "sm80-sm89.engine"
    assert bundle.engine_path("denoiser", "sm8") is None
    total = sum(entry.size for entry in bundle.manifest.files.values())
    assert done[-1] == (total, total)
    assert done == sorted(done)
    with pytest.raises(MissingFileError, match=r"has no 'nothing\.txt'"):
        bundle.file("nothing.txt")


@pytest.mark.parametrize("name", ["denoiser/model.onnx", "decoder/model.onnx.data", "decoder/sm80-sm89.engine", "parity.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_changed_byte(folder, name, at):
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)
    if name.endswith(".onnx"):
        with pytest.raises(BundleError):  # not ONNX any more, or another digest
            Bundle.open(folder)
        return
    with pytest.raises(DigestError, match=rf"{name} was changed: got SHA-256 [0-9a-f]{{64}}; expected [0-9a-f]{{64}}\. Copy"):
        Bundle.open(folder)
    Bundle.open(folder, verify=False)


def test_every_file_is_digested(pristine, folder):
    for name in Bundle.open(pristine).manifest.files:
        shutil.copy(pristine / name, folder / name)
        with open(folder / name, "r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))
        with pytest.raises(BundleError):
            Bundle.open(folder)
        shutil.copy(pristine / name, folder / name)
    Bundle.open(folder)


def test_a_cut_file_is_seen_without_digests(folder):
    with open(folder / "decoder" / "model.onnx.data", "r+b") as file:
        file.truncate(3)
    with pytest.raises(DigestError, match=r"cut off: got 3 bytes; expected 24\. Copy the file again, or rebuild"):
        Bundle.open(folder, verify=False)


def test_a_missing_file(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match=r"names 'tokenizer/tokenizer\.json', which is not in .*Copy the whole folder again"):
        Bundle.open(folder)


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(MissingFileError, match="got nothing; expected the folder of a bundle"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(MissingFileError, match="got a file; expected the folder"):
        Bundle.open(__file__)
    with pytest.raises(MissingFileError, match=r"manifest\.json: no such file"):
        Bundle.open(tmp_path)


def test_a_manifest_that_would_block_its_reader(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match="special file; expected a regular file"):
        Bundle.open(tmp_path)


def test_a_truncated_manifest(folder):
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text[: len(text) // 2])
    with pytest.raises(ManifestError, match="the file ends too early"):
        Bundle.open(folder)


def test_a_newer_schema(folder):
    edit_manifest(folder, schema_version=5, something_new=1)
    with pytest.raises(SchemaVersionError, match="got schema 5, this program reads 2 to 4: upgrade"):
        Bundle.open(folder)


def test_an_older_schema(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for key in ("precision", "plugins"):
        del manifest[key]["text_projection"]
    files = {name: entry for name, entry in manifest["files"].items() if "text_projection" not in name}
    edit_manifest(folder, schema_version=1, precision=manifest["precision"], plugins=manifest["plugins"], files=files)
    with pytest.raises(SchemaVersionError, match="got schema 1, this program reads 2 to 4: rebuild the bundle"):
        Bundle.open(folder)


def test_a_link_that_leads_out(folder):
    secret = folder.parent / "secret"
    shutil.move(folder / "parity.json", secret)  # same bytes, same digest: only the place is wrong
    (folder / "parity.json").symlink_to(secret)
    with pytest.raises(UnsafePathError, match=r"'parity\.json' is a link that leads out of the bundle, to .*secret"):
        Bundle.open(folder, verify=False)


def rewrite_location(folder: Path, location: str) -> None:
    """Point the decoder's weights at `location`, with a manifest that fits: what a malicious writer would make."""
    path = folder / "decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    files["decoder/model.onnx"]["size"] = path.stat().st_size
    edit_manifest(folder, files=files)


@pytest.mark.parametrize(
    "location", ["../../secret", "/etc/hostname", "../denoiser/model.onnx.data", "unlisted.data", "./model.onnx.data", ""]
)
def test_external_data_that_leads_out(folder, location):
    (folder.parent / "secret").write_bytes(bytes(24))
    (folder / "decoder" / "unlisted.data").write_bytes(bytes(24))
    rewrite_location(folder, location)
    with pytest.raises(UnsafePathError, match=r"decoder/model\.onnx keeps weights in .*; expected the name of a file beside it"):
        Bundle.open(folder, verify=False)


def test_external_data_in_a_listed_file_is_fine(folder):
    rewrite_location(folder, "model.onnx.data")
    Bundle.open(folder, verify=False)


def test_another_tensorrt(folder):
    bundle = Bundle.open(folder)
    bundle.check_tensorrt(flavor="rtx", version="1.7.1.116")
    with pytest.raises(
        TensorRTVersionError, match=r"compiled by TensorRT for RTX 1\.7\.1\.116; this program runs TensorRT for RTX 1\.6\.1\.120"
    ):
        bundle.check_tensorrt(flavor="rtx", version="1.6.1.120")
    with pytest.raises(TensorRTVersionError, match=r"runs TensorRT 1\.7\.1\.116\. Install that version, rebuild"):
        bundle.check_tensorrt(flavor="full", version="1.7.1.116")


def test_another_gpu(folder, tmp_path):
    bundle = Bundle.open(folder)
    assert bundle.require_engine("decoder", "sm80") == (folder / "decoder" / "sm80-sm89.engine").resolve()
    with pytest.raises(
        ArchitectureError, match=r"this GPU is sm90, and the bundle has engines for sm80, sm89\. Rebuild on this machine"
    ):
        bundle.require_engine("decoder", "sm90")
    portable = write_fake_bundle(tmp_path / "portable")
    portable.check_tensorrt(flavor="rtx", version="9")  # nothing was compiled: any version will do
    with pytest.raises(ArchitectureError, match="no engines, only portable graphs"):
        portable.require_engine("decoder", "sm80")


def test_a_bundle_can_be_moved_and_read_through_a_link(folder, tmp_path):
    digest = Bundle.open(folder).digest
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    assert Bundle.open(tmp_path / "link").digest == digest


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_digests(case, tmp_path):
    for name, text in case["files"].items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    bundle = Bundle.open(tmp_path)
    bundle.verify()
    assert bundle.digest == case["digest"]
