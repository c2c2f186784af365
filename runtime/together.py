"""Several pieces of work at the same time, each in a thread of its own, and all of them over before anybody goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["together"]

Key = TypeVar("Key")
Result = TypeVar("Result")


def together(work: Mapping[Key, Callable[[], Result]], *, discard: Callable[[Result], object]) -> dict[Key, Result]:
    """What each piece of work returned, by its key.

    If one raises, the others end first, their results are given to `discard`, and the first error in the order of `work` is raised.
    So too for Ctrl-C: nobody may take away what a thread still works on.
    """
    if not work:
        return {}
    # Work begins when all threads are there: Ctrl-C while they are made can make the pool forget one, which then does nothing.
    decided, complete = threading.Event(), threading.Event()

    def begin(call: Callable[[], Result]) -> Result:
        decided.wait()
        if not complete.is_set():
            raise CancelledError
        return call()

    futures: dict[Key, Future[Result]] = {}
    interrupted: BaseException | None = None
    with ThreadPoolExecutor(len(work), thread_name_prefix="sana") as pool:
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
