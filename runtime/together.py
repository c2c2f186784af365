"""Several pieces of work at the same time, each in a thread of its own, and all of them over before anybody goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
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
    with ThreadPoolExecutor(len(work), thread_name_prefix="sana") as pool:
        futures = {key: pool.submit(call) for key, call in work.items()}
        interrupted: BaseException | None = None
        while True:
            try:
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
