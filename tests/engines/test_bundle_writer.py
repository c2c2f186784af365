"""A writer that dies at any moment leaves the old bundle or the new one, and nothing that stays for ever."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import fake_info, fill_fake_bundle, write_fake_bundle
from kills import kill_at_every_step

from engines import atomic
from engines.bundle import Bundle
from engines.bundle_writer import write_bundle
from engines.errors import BundleError, DiskFullError, MissingFileError, UnsafePathError
from engines.spec import Precision


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contents")
    for name, seed in (("old", 0), ("new", 1)):
        (folder / name).mkdir()
        fill_fake_bundle(folder / name, fake_info(), seed=seed)
    return folder


def write(contents: Path, out: Path, *, small: bool = False) -> Bundle:
    """small: a decoder alone, for tests that do it hundreds of times."""
    info = fake_info(precision={"decoder": Precision.BF16}, plugins={"decoder": {}}) if small else fake_info()
    with write_bundle(out) as writer:
        for path in sorted((contents / "decoder" if small else contents).rglob("*")):
            if path.is_file():
                writer.add(path, path.relative_to(contents).as_posix())
        return writer.finish(info)


def write_with(out: Path, fill: Callable[[Path], object]) -> Bundle:
    with write_bundle(out) as writer:
        fill(writer.path)
        return writer.finish(fake_info())


@pytest.fixture(params=["exchange", "fallback"])
def can_exchange(request, monkeypatch) -> bool:
    if request.param == "fallback":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param == "exchange"


@pytest.mark.slow
@pytest.mark.parametrize("start", [pytest.param("nothing", marks=pytest.mark.slow), "an old bundle"])
def test_killed_at_every_step(tmp_path, contents, can_exchange, start, monkeypatch):
    out, kept = tmp_path / "bundle", tmp_path / "kept"
    old = write(contents / "old", kept, small=True).digest
    new = write(contents / "new", tmp_path / "example", small=True).digest
    shutil.rmtree(tmp_path / "example")

    def before() -> None:
        for path in tmp_path.iterdir():
            if path != kept:
                shutil.rmtree(path)
        if start == "an old bundle":
            shutil.copytree(kept, out)

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and a killed process needs none
    found, recovered = [], 0
    for step in kill_at_every_step(lambda: write(contents / "new", out, small=True), before=before):
        was_there = out.is_dir()
        try:
            digest = Bundle.open(out).digest
        except MissingFileError:
            digest = "nothing"
        assert digest in {new, old if start == "an old bundle" else "nothing"}, f"step {step}"
        found.append(digest)
        recovered += digest != "nothing" and not was_there
        if step % 4 == 0:  # slow
            assert write(contents / "new", out, small=True).digest == new
            assert {path.name for path in tmp_path.iterdir()} == {"bundle", "kept"}, f"step {step}: leftovers stay"
    assert found == sorted(found, key=lambda digest: digest == new)  # once new, it stays new
    assert len(set(found)) == 2
    assert len(found) > 100
    assert (recovered > 0) == (start == "an old bundle" and not can_exchange)


def test_the_old_one_of_a_swap_that_was_killed_does_not_stay(tmp_path, contents, can_exchange):
    out = tmp_path / "bundle"
    write(contents / "old", out, small=True)
    shutil.copytree(out, tmp_path / ".bundle.old")  # as after the second rename of three
    write(contents / "new", out, small=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle", *([".bundle.old"] if can_exchange else [])}


def test_killed_from_outside(tmp_path, contents):
    """The same without a profiler: a real process, killed while it copies."""
    out = tmp_path / "bundle"
    old = write(contents / "old", out).digest
    code = (
        "import sys, time, pathlib\nfrom engines.bundle_writer import write_bundle\n"
        "with write_bundle(sys.argv[1]) as writer:\n"
        "    (writer.path / 'half').write_bytes(b'x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    write(contents / "old", out)
    assert len(list(tmp_path.iterdir())) == 2  # it lives: its folder is left alone
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert Bundle.open(out).digest == old
    write(contents / "old", out)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_two_writers_at_once(tmp_path, contents):
    """Readers see a whole bundle all the while, or one of the errors that say: open it again."""
    out = tmp_path / "bundle"
    digests = {write(contents / name, out).digest for name in ("old", "new")}
    children = []
    for name in ("old", "new"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(10):
                    write(contents / name, out)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    whole = 0
    deadline = time.monotonic() + 300
    while children and time.monotonic() < deadline:
        try:
            whole += Bundle.open(out).digest in digests
        except BundleError as error:  # a reader between two bundles
            if not out.is_dir():
                raise AssertionError("there was a moment without a bundle") from error
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            children.pop(0)
    assert not children
    assert whole > 0
    assert Bundle.open(out).digest in digests
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_error_inside_leaves_the_old_bundle(tmp_path, contents):
    old = write(contents / "old", tmp_path / "bundle").digest
    with pytest.raises(FileNotFoundError):
        write_with(tmp_path / "bundle", lambda folder: shutil.copyfile(contents / "nothing", folder / "parity.json"))
    with write_bundle(tmp_path / "bundle"):
        pass  # never finished
    assert Bundle.open(tmp_path / "bundle").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_reader_would_refuse_is_never_swapped_in(tmp_path, contents):
    old = write(contents / "old", tmp_path / "bundle").digest

    def fill(folder: Path) -> None:
        shutil.copytree(contents / "new", folder, dirs_exist_ok=True)
        (folder / "denoiser" / "model.onnx.data").unlink()

    with pytest.raises(UnsafePathError, match=r"keeps weights in 'model\.onnx\.data'"):
        write_with(tmp_path / "bundle", fill)
    assert Bundle.open(tmp_path / "bundle").digest == old


def test_bad_names_and_links_are_refused(tmp_path, contents):
    source = contents / "old" / "parity.json"
    with pytest.raises(UnsafePathError, match="leads out"), write_bundle(tmp_path / "bundle") as writer:
        writer.add(source, "../parity.json")
    with pytest.raises(BundleError, match="link or a special file"):
        write_with(tmp_path / "bundle", lambda folder: (folder / "parity.json").symlink_to(source))
    with pytest.raises(BundleError, match="no known role"):
        write_with(tmp_path / "bundle", lambda folder: (folder / "evil.so").write_bytes(b""))
    assert list(tmp_path.iterdir()) == []


def test_only_a_bundle_or_nothing_is_replaced(tmp_path, contents):
    home = tmp_path / "home"
    home.mkdir()
    assert write(contents / "old", home).path == home  # empty
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match=r"with files and no manifest\.json.*replacing deletes"):
        write(contents / "old", tmp_path / "documents")
    with pytest.raises(BundleError, match="got a file"):
        write(contents / "old", tmp_path / "documents" / "letter.txt")
    assert (tmp_path / "documents" / "letter.txt").read_text() == "dear"


def test_a_link_to_a_bundle_stays_a_link(tmp_path, contents):
    write(contents / "old", tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    new = write(contents / "new", tmp_path / "link").digest
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "real").digest == new


def test_folders_of_other_bundles_are_left_alone(tmp_path, contents):
    for name in (".bundle.new-", ".bundle.new-12345678.old", ".bundle.new-1234567", ".other.new-12345678", "bundle.new-12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.new-deadbeef").mkdir()
    (tmp_path / ".bundle.new-00000000").write_text("a file")
    write(contents / "old", tmp_path / "bundle")
    assert len(list(tmp_path.iterdir())) == 7
    assert not (tmp_path / ".bundle.new-deadbeef").exists()


def test_permissions_follow_the_umask(tmp_path, contents):
    old = os.umask(0o027)
    try:
        write(contents / "old", tmp_path / "bundle")
    finally:
        os.umask(old)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "bundle" / "manifest.json").stat().st_mode & 0o777 == 0o640


def test_full_disk(tmp_path, contents, monkeypatch):
    old = write(contents / "old", tmp_path / "bundle").digest

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DiskFullError, match=r"disk full: got .* free at .*expected room for .*\(--out\)"):
        write(contents / "new", tmp_path / "bundle")
    monkeypatch.undo()
    with pytest.raises(DiskFullError, match="expected more"):
        write_with(tmp_path / "bundle", lambda folder: Path("/dev/full").write_bytes(b"x"))
    assert Bundle.open(tmp_path / "bundle").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_cannot_be_replaced(tmp_path, contents, monkeypatch):
    old = write(contents / "old", tmp_path / "bundle").digest

    def cross_device(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(atomic, "_exchange", cross_device)  # as overlayfs answers for a folder of a lower layer
    with pytest.raises(BundleError, match=r"cannot be replaced \(.*cross-device.*\)\. Remove it first, or choose another --out"):
        write(contents / "new", tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_file_system_without_locks_is_named(tmp_path, contents, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    with pytest.raises(BundleError, match="has no locks"):
        write(contents / "old", tmp_path / "bundle")


def test_the_same_content_has_the_same_digest(tmp_path):
    assert write_fake_bundle(tmp_path / "a").digest == write_fake_bundle(tmp_path / "b").digest
    assert write_fake_bundle(tmp_path / "a", seed=2).digest != write_fake_bundle(tmp_path / "b").digest
