"""Digests of many files at once, and of parts of files."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import digest
from engines.digest import BLOCK_BYTES, PART_BYTES, Span, file_sha256, num_parts, parts_of, spans_sha256


@given(contents=st.lists(st.binary(max_size=64), max_size=9), threads=st.integers(1, 5))
def test_the_same_as_one_by_one_and_in_order(tmp_path_factory, contents: list[bytes], threads: int) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    seen: list[int] = []
    found = spans_sha256([Span(path) for path in paths], threads=threads, progress=seen.append)
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

    spans_sha256([Span(path) for path in paths], progress=progress)


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
        spans_sha256([Span(path) for path in paths], threads=4, progress=progress)
    assert len(calls) <= 4  # a block of each thread, of 64


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        spans_sha256([Span(tmp_path / "none")])


def test_how_many_parts() -> None:
    sizes = {0: 0, 1: 0, PART_BYTES: 0, PART_BYTES + 1: 2, 2 * PART_BYTES: 2, 2 * PART_BYTES + 1: 3, 1 << 50: 1 << 24}
    assert {size: num_parts(size) for size in sizes} == sizes


@pytest.fixture
def parts_of_8_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PART_BYTES", 8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=9, max_size=64), threads=st.integers(1, 5))
def test_parts_are_all_of_a_file(parts_of_8_bytes: None, tmp_path: Path, content: bytes, threads: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    seen: list[int] = []
    found = spans_sha256(parts_of(path, len(content)), threads=threads, progress=seen.append)
    assert found == [hashlib.sha256(content[at : at + 8]).hexdigest() for at in range(0, len(content), 8)]
    assert sum(seen) == len(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(min_size=9, max_size=40), at=st.integers(0, 40), inserted=st.binary(max_size=9), removed=st.integers(0, 40)
)
def test_parts_see_what_the_whole_digest_sees(
    parts_of_8_bytes: None, tmp_path: Path, content: bytes, at: int, inserted: bytes, removed: int
) -> None:
    path = tmp_path / "file"

    def digests(data: bytes) -> tuple[str, list[str]]:
        path.write_bytes(data)
        return file_sha256(path), spans_sha256(parts_of(path, len(content)))  # parts of the size that the manifest has

    (whole, parts), (changed_whole, changed_parts) = digests(content), digests(content[:at] + inserted + content[at + removed :])
    assert (parts == changed_parts) == (whole == changed_whole)


def test_parts_that_are_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PART_BYTES", 2 * BLOCK_BYTES + 3)
    content = np.arange(5 * BLOCK_BYTES // 4, dtype="<u4").tobytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    expected = [
        hashlib.sha256(content[at : at + digest.PART_BYTES]).hexdigest() for at in range(0, len(content), digest.PART_BYTES)
    ]
    assert spans_sha256(parts_of(path, len(content))) == expected
    assert len(expected) == 3
