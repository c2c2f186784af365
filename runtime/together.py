"""Several pieces of work at the same time, in threads, and all of them over before anybody goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

__all__ = ["MAX_THREADS", "begun", "default_threads", "each", "together"]

MAX_THREADS = 16  # that are kept: a picture of 1024 px has as many stripes

Item = TypeVar("Item")
Key = TypeVar("Key")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of each item, in order, as `together` does it but in threads that are kept: starting them takes a millisecond.

    For short work that waits for nothing, `each` included.
    """
    pieces = {number: partial(work, item) for number, item in enumerate(items)}
    try:
        return list(_together(pieces, lambda _: None, _kept_threads(os.getpid())).values())
    except BaseException:  # Ctrl-C above all: then the pool may have forgotten a thread, which ends when the pool is let go
        _kept_threads.cache_clear()
        raise


def begun(work: Callable[[], Result]) -> Callable[[], Result]:
    """`work`, begun in a thread that is kept, as in `each`. A call waits for it, and returns or raises what it does."""
    try:
        return _kept_threads(os.getpid()).submit(work).result
    except BaseException:  # Ctrl-C: see each
        _kept_threads.cache_clear()
        raise


def together(work: Mapping[Key, Callable[[], Result]], *, discard: Callable[[Result], object]) -> dict[Key, Result]:
    """What each piece of work returned, by its key, each in a thread of its own.

    If one raises, the others end first, their results are given to `discard`, and the first error in the order of `work` is raised.
    So too for Ctrl-C: nobody may take away what a thread still works on.
    """
    if not work:
        return {}
    with ThreadPoolExecutor(len(work), thread_name_prefix="sana") as pool:
        return _together(work, discard, pool)


@lru_cache(maxsize=1)
def _kept_threads(process: int) -> ThreadPoolExecutor:
    """Those of one process: threads do not survive a fork."""
    return ThreadPoolExecutor(min(MAX_THREADS, default_threads()), thread_name_prefix=f"sana-{process}")


def _together(
    work: Mapping[Key, Callable[[], Result]], discard: Callable[[Result], object], pool: ThreadPoolExecutor
) -> dict[Key, Result]:
    # Work begins when all threads are there: Ctrl-C while they are made can make the pool forget one, which then does nothing.
    decided, complete = threading.Event(), threading.Event()

    def begin(call: Callable[[], Result]) -> Result:
        decided.wait()
        if not complete.is_set():
            raise CancelledError
        return call()

    futures: dict[Key, Future[Result]] = {}
    interrupted: BaseException | None = None
    try:
        for key, call in work.items():
            futures[key] = pool.submit(begin, call)
        complete.set()
    except BaseException as error:
        interrupted = error
    while True:
        try:
            decided.set()
            wait(futures.values())
            break
        except BaseException as error:  # Ctrl-C, perhaps several times
            interrupted = interrupted or error
    errors = list(filter(None, (future.exception() for future in futures.values())))
    if interrupted is None and not errors:
        return {key: future.result() for key, future in futures.items()}
    for future in futures.values():
        if future.exception() is None:
            discard(future.result())
    raise interrupted or errors[0]


def default_threads() -> int:
    """As many as this process may keep busy: task sets and containers hide cores that os.cpu_count() counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()  # a container's, in microseconds
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or a quota of "max"
        return cores
