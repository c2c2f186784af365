"""Work in threads is over before anybody goes on: results in order, the first error, Ctrl-C; threads that are kept, and a fork."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.together import MAX_THREADS, begun, each, together


def test_together_keeps_results_by_their_keys() -> None:
    assert together({}, discard=print) == {}
    work = {n: functools.partial(lambda n: (time.sleep(0.02 * (3 - n)), n)[1], n) for n in range(3)}
    assert together(work, discard=print) == {0: 0, 1: 1, 2: 2}


def test_ctrl_c_while_threads_are_made_starts_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, done = ThreadPoolExecutor.submit, []

    def interrupted(self, *arguments):
        if len(self._threads) == 2:
            raise KeyboardInterrupt
        return submit(self, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together({n: functools.partial(done.append, n) for n in range(4)}, discard=done.append)
    assert done == []


def test_each_keeps_order_and_threads() -> None:
    assert each(lambda item: item * 2, []) == []
    assert each(lambda item: item * 2, range(40)) == [item * 2 for item in range(40)]
    before = threading.active_count()
    assert len(set(each(lambda _: threading.get_ident(), range(40)))) <= MAX_THREADS
    assert threading.active_count() <= max(before, MAX_THREADS + 1)


def test_begun_goes_on_meanwhile() -> None:
    go_on, here = threading.Event(), threading.get_ident()
    wait = begun(lambda: (go_on.wait(10), threading.get_ident()))
    go_on.set()
    went_on, thread = wait()
    assert went_on
    assert thread != here
    assert wait() == (went_on, thread)  # done once


def test_begun_raises_what_its_work_does() -> None:
    def work() -> None:
        raise ValueError("not to be had")

    wait = begun(work)
    with pytest.raises(ValueError, match="not to be had"):
        wait()


def test_each_ends_before_an_error_comes_out() -> None:
    done = []

    def work(item: int) -> None:
        if item == 0:
            raise ValueError("the first")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="the first"):
        each(work, range(4))
    assert sorted(done) == [1, 2, 3]


def test_each_after_ctrl_c(ctrl_c, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def work(item: int) -> None:
        if item == 0:
            os.kill(os.getpid(), signal.SIGINT)  # to the thread that waits
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        each(work, range(4))
    assert sorted(done) == [0, 1, 2, 3]
    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "submit", ctrl_c_at_once)
        with pytest.raises(KeyboardInterrupt):
            each(done.append, range(4))
    assert len(done) == 4
    assert each(abs, [-1]) == [1]


def ctrl_c_at_once(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_each_after_a_fork() -> None:
    """The threads stay behind in the parent. In a process of its own, so that only these threads are forked."""
    code = """
import os
from runtime.together import each
each(abs, range(40))
child = os.fork()
assert each(abs, range(40)) == list(range(40))
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])
