"""SHA-256 of files and of plain data."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["BLOCK_BYTES", "Progress", "digest_of", "file_sha256", "files_sha256"]

BLOCK_BYTES = 8 << 20  # large enough that hashing dominates the calls, small beside any model

Progress = Callable[[int], None]  # called with the number of bytes done since the last call


def file_sha256(path: Path, *, progress: Progress | None = None) -> str:
    """SHA-256 of a file in hexadecimal, read in blocks of 8 MB."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(min(BLOCK_BYTES, max(1, os.fstat(file.fileno()).st_size))))
        while num_read := file.readinto(block):
            digest.update(block[:num_read])
            if progress is not None:
                progress(num_read)
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path], *, threads: int = 4, progress: Progress | None = None) -> list[str]:
    """SHA-256 of each file, in order; several at the same time, since hashlib lets go of Python's lock.

    progress: called by one thread at a time. What it or a file raises stops all of them; so does Ctrl-C.
    """
    stopped, lock = threading.Event(), threading.Lock()

    def advance(num_bytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another file failed")  # nobody sees it
        if progress is not None:
            with lock:
                progress(num_bytes)

    largest_first = sorted(range(len(paths)), key=lambda i: -paths[i].stat().st_size)  # else the last one to start may be it
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sha256")
    try:
        futures = {i: pool.submit(file_sha256, paths[i], progress=advance) for i in largest_first}
        return [futures[i].result() for i in range(len(paths))]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def digest_of(value: object) -> str:
    """SHA-256 in hexadecimal of `value` as canonical JSON: keys sorted, no spaces, no NaN.

    Equal values have equal digests across machines and runs. Raises TypeError for what JSON has no word for, ValueError for NaN.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
