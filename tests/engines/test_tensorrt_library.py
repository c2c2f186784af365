"""TensorRT's errors in messages: engines load in several threads, and each failure names its own reason."""

import _thread
import threading

from engines.tensorrt_library import load, logger, why


def in_foreign_thread(call) -> None:
    """As TensorRT's own threads are: Python did not start them."""
    done = threading.Event()
    _thread.start_new_thread(lambda: (call(), done.set()), ())
    assert done.wait(200)


def test_each_thread_is_told_of_its_own_errors_and_of_tensorrts() -> None:
    error, logs = load().ILogger.Severity.ERROR, logger()
    logs.clear()
    reasons = {}

    def fail(name: str, failed: threading.Event, other: threading.Event) -> None:
        logs.clear()
        logs.log(error, f"{name} is broken")
        failed.set()
        assert other.wait(200)
        reasons[name] = why()

    events = [threading.Event(), threading.Event()]
    threads = [
        threading.Thread(target=fail, args=("decoder", *events)),
        threading.Thread(target=fail, args=("denoiser", *events[::-1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == {name: f" TensorRT says:\n  {name} is broken" for name in ("decoder", "denoiser")}
    assert why() == " TensorRT gave no reason."
    for _ in range(2):  # a thread is foreign the second time too
        in_foreign_thread(lambda: logs.log(error, "no memory"))
    assert why() == " TensorRT says:\n  no memory\n  no memory"
    logs.clear()
    assert why() == " TensorRT gave no reason."
