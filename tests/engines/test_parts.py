"""A bundle's files that are digested in parts: no change of them passes, and the words are those of a file without parts."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from fakes import write_fake_bundle

from apps.cli.main import main
from engines import digest
from engines.bundle import Bundle
from engines.errors import DigestError, ManifestError

PART_BYTES = 1000
NAME = "parity/denoiser.safetensors"
SIZE = 3176  # bytes of it: four parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PART_BYTES", PART_BYTES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_bundle(tmp_path / "b").path


def edit_entry(folder: Path, **changes: object) -> None:
    """Change what the manifest says of NAME; a value of None removes a key."""
    document = json.loads((folder / "manifest.json").read_bytes())
    entry = document["files"][NAME] | changes
    document["files"][NAME] = {key: value for key, value in entry.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(document))


def test_what_the_writer_writes(folder: Path) -> None:
    for name, entry in Bundle.open(folder).manifest.files.items():
        content = (folder / name).read_bytes()
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
        chunks = [content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES)]
        assert entry.parts == (tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks) if len(chunks) > 1 else ())
    assert len(Bundle.open(folder).manifest.files[NAME].parts) == 4


def test_small_files_have_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PART_BYTES", 1 << 20)
    folder = write_fake_bundle(tmp_path / "small").path
    assert b"parts" not in (folder / "manifest.json").read_bytes()


def test_a_changed_byte_in_any_part(folder: Path) -> None:
    content = (folder / NAME).read_bytes()
    for at in (0, 999, 1000, 1999, 2000, 2999, 3000, SIZE - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        (folder / NAME).write_bytes(changed)
        got, expected = (hashlib.sha256(data).hexdigest() for data in (changed, content))
        words = rf"{NAME} was changed: got SHA-256 {got}; expected {expected}\. Copy the file again, or rebuild\."
        for whole in (False, True):
            with pytest.raises(DigestError, match=words):
                Bundle.open(folder, verify=False).verify(whole=whole)


def test_parts_in_another_order(folder: Path) -> None:
    content = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(content[1000:2000] + content[:1000] + content[2000:])
    with pytest.raises(DigestError, match="was changed: got SHA-256"):
        Bundle.open(folder)


def test_bytes_added_after_it_was_opened(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with open(folder / NAME, "ab") as file:
        file.write(b"x")
    with pytest.raises(DigestError, match="was changed: got SHA-256"):
        bundle.verify()


def test_a_bundle_of_before_opens(folder: Path) -> None:
    edit_entry(folder, parts=None)
    assert Bundle.open(folder).manifest.files[NAME].parts == ()
    (folder / NAME).write_bytes(bytes(SIZE))
    with pytest.raises(DigestError, match="was changed: got SHA-256"):
        Bundle.open(folder)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_wrong_number_of_parts(folder: Path, count: int) -> None:
    edit_entry(folder, parts=["0" * 64] * count)
    words = rf"parts: got {count} digests for {SIZE} bytes; expected 4, one for each 64 MiB of a file that is larger"
    with pytest.raises(ManifestError, match=words):
        Bundle.open(folder, verify=False)


def test_parts_of_a_file_that_has_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Bundle.open(folder).manifest.files[NAME].parts
    monkeypatch.setattr(digest, "PART_BYTES", SIZE)
    edit_entry(folder, parts=parts)
    with pytest.raises(ManifestError, match=f"parts: got 4 digests for {SIZE} bytes; expected 0"):
        Bundle.open(folder, verify=False)


def test_digests_of_unlike_bytes_in_one_entry(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Bundle.open(folder).manifest.files[NAME].parts
    edit_entry(folder, parts=[*parts[:3], "0" * 64])  # the bytes are those of sha256
    words = rf"{NAME} has the SHA-256 of the manifest, and its parts have not\. Rebuild the bundle\."
    for whole in (False, True):
        with pytest.raises(DigestError, match=words):
            Bundle.open(folder, verify=False).verify(whole=whole)
    edit_entry(folder, parts=parts, sha256="0" * 64)  # the bytes are those of the parts
    Bundle.open(folder)
    with pytest.raises(DigestError, match=r"was changed: got SHA-256 [0-9a-f]{64}; expected 0{64}"):
        Bundle.open(folder, verify=False).verify(whole=True)
    assert main(["verify", str(folder), "--digests-only"]) == 2
    assert f"{NAME} was changed: got SHA-256" in capsys.readouterr().err


def test_progress_is_of_all_that_is_read(folder: Path) -> None:
    bundle = Bundle.open(folder, verify=False)
    entries = bundle.manifest.files.values()
    total, twice = sum(entry.size for entry in entries), sum(entry.size for entry in entries if entry.parts)
    done: list[tuple[int, int]] = []
    for whole, expected in ((False, total), (True, total + twice)):
        done.clear()
        bundle.verify(whole=whole, progress=lambda *bytes_done: done.append(bytes_done))
        assert done == sorted(done)
        assert done[-1] == (expected, expected)


def test_a_copy_is_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(folder, tmp_path / "copy"))
    assert copy == Bundle(path=copy.path, manifest=Bundle.open(folder).manifest, digest=Bundle.open(folder).digest)
    assert copy.manifest.model_dump_json(indent=1) + "\n" == (folder / "manifest.json").read_text()
