"""Digests of many files at once."""

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.digest import BLOCK_BYTES, file_sha256, files_sha256


@given(contents=st.lists(st.binary(max_size=64), max_size=9), threads=st.integers(1, 5))
def test_the_same_as_one_by_one_and_in_order(tmp_path_factory, contents: list[bytes], threads: int) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    seen: list[int] = []
    found = files_sha256(paths, threads=threads, progress=seen.append)
    assert found == [hashlib.sha256(content).hexdigest() for content in contents] == [file_sha256(path) for path in paths]
    assert sum(seen) == sum(map(len, contents))


def test_progress_is_told_by_one_thread_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(8)]
    for path in paths:
        path.write_bytes(bytes(1000))
    inside = threading.Lock()

    def progress(num_bytes: int) -> None:
        assert inside.acquire(blocking=False)
        threading.Event().wait(0.002)
        inside.release()

    files_sha256(paths, progress=progress)


def test_what_progress_raises_stops_the_others(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(16 * BLOCK_BYTES)
    calls: list[int] = []

    def progress(num_bytes: int) -> None:
        calls.append(num_bytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files_sha256(paths, progress=progress)
    assert len(calls) <= 4  # a block of each thread, of 64


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files_sha256([tmp_path / "none"])
