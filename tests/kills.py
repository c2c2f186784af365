"""Kill a process at every system call that changes something, one process a call."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Python's doors to the system, but those that only look: a kill beside them finds what a kill beside the last change found.
# Both sides of each call are steps: before it, and after it.
_SYSTEM = ("posix", "fcntl", "_io")
_ONLY_LOOK = {"fspath", "_path_normpath", "stat", "lstat", "fstat", "statvfs", "is_dir", "is_file", "scandir", "listdir", "fileno"}
_ONLY_LOOK |= {"readinto", "read", "readline", "readall", "readlink", "strerror", "getpid", "umask"}


def _is_step(frame: FrameType, event: str, arg: Any) -> bool:
    if event in ("c_call", "c_return"):
        module = getattr(arg, "__module__", None) or type(getattr(arg, "__self__", None)).__module__
        return module in _SYSTEM and arg.__name__ not in _ONLY_LOOK
    # Foreign functions are seen as the calls and returns of their wrappers.
    return event in ("call", "return") and frame.f_globals.get("__name__") == "engines.atomic"


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that sends itself SIGKILL at its step number `step`. False if it ended before, without an error."""
    child = os.fork()
    if child == 0:
        left = step

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal left
            if _is_step(frame, event, arg):
                if left == 0:
                    sys.setprofile(None)
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        code = 1
        try:
            sys.setprofile(profile)
            action()
            sys.setprofile(None)
            code = 0
        finally:
            os._exit(code)  # never back into pytest
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the action failed by itself before step {step}"
    return False


def kill_at_every_step(action: Callable[[], object], *, before: Callable[[], object], most: int = 5000) -> Iterator[int]:
    """Yields after each kill, with the number of the step; `before` makes the state that each run starts from."""
    for step in range(most):
        before()
        if not killed_at(step, action):
            return
        yield step
    raise AssertionError(f"the action took more than {most} steps")
