"""The cache of build stages: whole entries or none, checked whenever they are used, shared by any number of processes."""

import errno
import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from kills import kill_at_every_step

from engines.errors import DiskFullError
from engines.store import Store, default_root, digest_of, file_sha256

KEY = digest_of({"stage": "test"})


class Maker:
    """Writes two files and counts how often it was asked to."""

    def __init__(self, content: bytes = b"weights") -> None:
        self.content, self.count = content, 0

    def __call__(self, folder: Path) -> None:
        self.count += 1
        (folder / "part").mkdir()
        (folder / "model.onnx").write_bytes(b"graph")
        (folder / "part" / "data").write_bytes(self.content)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {"model.onnx": b"graph", "part/data": b"weights"}


def test_a_second_run_does_no_work(tmp_path):
    make, store = Maker(), Store(tmp_path)
    first, second = store.get_or_make(KEY, make), Store(tmp_path).get_or_make(KEY, make)
    assert first == second
    assert make.count == 1
    assert content(second) == WHOLE
    assert store.get_or_make("other", make) != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "files" / "part" / "data").write_bytes(b"weightz"),
        lambda entry: (entry / "files" / "part" / "data").write_bytes(b"weigh"),
        lambda entry: (entry / "files" / "part" / "data").unlink(),
        lambda entry: (entry / "files" / "more").write_bytes(b""),
        lambda entry: (entry / "files" / "link").symlink_to("/etc/hostname"),
        lambda entry: (entry / "index.json").write_bytes(b'{"schema_version": 1'),
        lambda entry: (entry / "index.json").unlink(),
        lambda entry: (entry / "index.json").write_text(json.dumps({"schema_version": 1, "key": "other", "files": {}})),
    ],
    ids=["changed", "cut", "missing", "extra", "link", "index cut", "no index", "another index"],
)
def test_a_damaged_entry_is_made_again_and_said_so(tmp_path, damage, caplog):
    make, store = Maker(), Store(tmp_path)
    folder = store.get_or_make(KEY, make)
    damage(folder.parent)
    with caplog.at_level(logging.WARNING):
        assert content(store.get_or_make(KEY, make)) == WHOLE
    assert make.count == 2
    assert "is damaged and is made again" in caplog.text
    caplog.clear()
    store.get_or_make(KEY, make)
    assert make.count == 2
    assert not caplog.text
    assert not list((tmp_path / "tmp").iterdir())


def test_an_error_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("no")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="no"):
        store.get_or_make(KEY, fail)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert content(store.get_or_make(KEY, Maker())) == WHOLE


@pytest.mark.slow
@pytest.mark.parametrize("start", ["nothing", "a damaged entry"])
def test_killed_at_every_step(tmp_path, start):
    store = Store(tmp_path / "store")
    entry = tmp_path / "store" / KEY[:2] / KEY

    def before() -> None:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        if start == "a damaged entry":
            store.get_or_make(KEY, Maker())
            (entry / "files" / "model.onnx").write_bytes(b"grape")

    made = []
    for step in kill_at_every_step(lambda: store.get_or_make(KEY, Maker()), before=before):
        make = Maker()
        assert content(store.get_or_make(KEY, make)) == WHOLE, f"step {step}"
        assert not list((tmp_path / "store" / "tmp").glob("*")) or not make.count, f"step {step}: leftovers stay"
        made.append(make.count)
    assert made == sorted(made, reverse=True)  # once there, it stays
    assert set(made) == {0, 1}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), RuntimeError("I/O error: No space left on device (os error 28)")],
)
def test_full_disk(tmp_path, error):
    store = Store(tmp_path)
    store.get_or_make("old", Maker())

    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(bytes(2000))
        raise error

    with pytest.raises(
        DiskFullError, match=r"got .* free at .*beside the 2\.0 kB written there so far; expected more\. .*SANA_CACHE_DIR"
    ):
        store.get_or_make(KEY, fill)
    assert not list((tmp_path / "tmp").iterdir())
    make = Maker()
    store.get_or_make("old", make)
    assert make.count == 0


def test_a_really_full_device(tmp_path):
    with pytest.raises(DiskFullError):
        Store(tmp_path).get_or_make(KEY, lambda folder: Path("/dev/full").write_bytes(b"x"))


def test_too_little_room_is_refused_before_the_work(tmp_path):
    make = Maker()
    with pytest.raises(DiskFullError, match=r"expected room for 1000000\.0 TB"):
        Store(tmp_path).get_or_make(KEY, make, needed=10**18)
    assert make.count == 0
    assert not list((tmp_path / "tmp").iterdir())


def fork(action) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def test_processes_at_once(tmp_path):
    """All of them get whole results; those that finish second get the first one's."""
    results = tmp_path / "results"
    results.mkdir()

    def work(number: int) -> None:
        class Slow(Maker):
            def __call__(self, folder: Path) -> None:
                super().__call__(folder)
                time.sleep(0.05)
                (folder / "who").write_text(str(number))

        for turn in range(5):
            folder = Store(tmp_path / "store").get_or_make(f"key{turn}", Slow())
            (results / f"{number}-{turn}").write_text((folder / "who").read_text())

    children = [fork(lambda number=number: work(number)) for number in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    for turn in range(5):
        assert len({(results / f"{number}-{turn}").read_text() for number in range(4)}) == 1
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_processes_that_find_one_damaged_entry(tmp_path):
    store = Store(tmp_path / "store")
    for _ in range(5):
        (store.get_or_make(KEY, Maker()) / "model.onnx").write_bytes(b"grape")
        children = [fork(lambda: content(store.get_or_make(KEY, Maker())) == WHOLE or 1 / 0) for _ in range(4)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4


@pytest.mark.parametrize("key", ["", "a", "../x", "a/b", "a.b", "x" * 129, "ä" * 5])
def test_bad_keys(tmp_path, key):
    with pytest.raises(ValueError, match="expected 2 to 128 letters"):
        Store(tmp_path).get_or_make(key, Maker())


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("SANA_CACHE_DIR", "/somewhere")
    assert default_root() == Path("/somewhere")
    monkeypatch.setenv("SANA_CACHE_DIR", "")
    assert default_root() == Path.home() / ".cache" / "sana"


def test_digests(tmp_path):
    assert digest_of({"b": 1, "a": [1.5, None, "ä"]}) == digest_of({"a": [1.5, None, "ä"], "b": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        digest_of(float("nan"))
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert file_sha256(tmp_path / "empty").startswith("e3b0c442")
