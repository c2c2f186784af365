"""SHA-256 of files, of their parts, and of plain data."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

__all__ = ["BLOCK_BYTES", "PART_BYTES", "Progress", "Span", "digest_of", "file_sha256", "num_parts", "parts_of", "spans_sha256"]

BLOCK_BYTES = 1 << 20  # large enough that hashing dominates the calls, small enough for a core's own cache; each thread has one
PART_BYTES = 64 << 20  # of the format (docs/bundle.md): enough parts for all cores, few beside the rest of a manifest
MIN_THREADS, MAX_THREADS = 4, 32  # of SHA-256: some may wait for a disk; past 32 they wait for memory

Progress = Callable[[int], None]  # called with the number of bytes done since the last call


class Span(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int = 0
    size: int | None = None  # None: to the end of the file


def num_parts(size: int) -> int:
    """How many parts a file of `size` bytes has that is digested in parts: one for each 64 MiB. A file of one has none."""
    return -(-size // PART_BYTES) if size > PART_BYTES else 0


def parts_of(path: Path, size: int) -> list[Span]:
    """The parts of a file of `size` bytes, in order. The last reaches to its end, so that what was added to it is seen."""
    starts = [index * PART_BYTES for index in range(num_parts(size))]
    return [Span(path, start, None if start == starts[-1] else PART_BYTES) for start in starts]


def file_sha256(path: Path, *, progress: Progress | None = None) -> str:
    """SHA-256 of a file in hexadecimal."""
    return _span_sha256(Span(path), progress)


def _span_sha256(span: Span, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    with open(span.path, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - span.start if span.size is None else span.size
        file.seek(span.start)
        block = memoryview(bytearray(min(BLOCK_BYTES, max(1, left))))
        while num_read := file.readinto(block if span.size is None else block[:left]):
            digest.update(block[:num_read])
            left -= num_read
            if progress is not None:
                progress(num_read)
    return digest.hexdigest()


def spans_sha256(spans: Sequence[Span], *, threads: int | None = None, progress: Progress | None = None) -> list[str]:
    """SHA-256 of each span, in order; several at the same time, since hashlib lets go of Python's lock.

    threads: one for each core that this process may use, 4 to 32, unless given.
    progress: called by one thread at a time. What it or a file raises stops all of them; so does Ctrl-C.
    """
    stopped, lock = threading.Event(), threading.Lock()

    def advance(num_bytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another file failed")  # nobody sees it
        if progress is not None:
            with lock:
                progress(num_bytes)

    sizes = [span.path.stat().st_size - span.start if span.size is None else span.size for span in spans]
    largest_first = sorted(range(len(spans)), key=lambda i: -sizes[i])  # else the last one to start may be it
    pool = ThreadPoolExecutor(threads or _num_threads(), thread_name_prefix="sha256")
    try:
        futures = {i: pool.submit(_span_sha256, spans[i], advance) for i in largest_first}
        return [futures[i].result() for i in range(len(spans))]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _num_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(MIN_THREADS, cores), MAX_THREADS)


def digest_of(value: object) -> str:
    """SHA-256 in hexadecimal of `value` as canonical JSON: keys sorted, no spaces, no NaN.

    Equal values have equal digests across machines and runs. Raises TypeError for what JSON has no word for, ValueError for NaN.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
