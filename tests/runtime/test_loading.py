"""A picture's engines load at the same time; an error or Ctrl-C in the middle leaves nothing behind and nothing half done."""

import functools
import os
import signal
import threading
import time

import pytest
from fake_tensorrt import FakeCuda, fake_backend

import runtime.trt_backend
from engines.bundle import Bundle
from engines.errors import SanaError
from engines.spec import COMPONENTS
from runtime import SanaEngine
from runtime.trt_session import TensorRTSession

REQUEST = {"seed": 3, "steps": 2, "width": 32, "height": 32}


@pytest.fixture
def opened(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    def opened(before_load=lambda component: None, cuda=cuda, **options) -> SanaEngine:
        make = functools.partial(fake_backend, cuda=cuda, before_load=before_load)
        monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", make)
        return SanaEngine(bundle, backend="tensorrt", **options)

    return opened


def test_engines_load_at_the_same_time_for_the_first_picture(opened) -> None:
    together_ = threading.Barrier(len(COMPONENTS))
    with opened(lambda component: together_.wait(timeout=200)) as engine:
        assert engine._backend.load_s == {}
        engine.generate("a cat", **REQUEST)  # one after another would break the barrier
        assert set(engine._backend.load_s) == set(COMPONENTS)


def test_cuda_is_current_in_each_thread_that_loads(opened, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    current, loading = set(), []
    monkeypatch.setattr(cuda, "make_current", lambda: current.add(threading.get_ident()))
    with opened(lambda component: loading.append(threading.get_ident() in current)) as engine:
        engine.generate("a cat", **REQUEST)
    assert loading == [True] * len(COMPONENTS)


def test_low_memory_loads_the_text_encoder_first_and_alone(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    close = TensorRTSession.close

    def closed(self: TensorRTSession) -> None:
        events.append(f"-{self._path.parent.name}")
        close(self)

    monkeypatch.setattr(TensorRTSession, "close", closed)
    with opened(events.append, low_memory=True) as engine, opened(cuda=FakeCuda()) as other:
        picture = engine.generate("a cat", **REQUEST)[0]
        assert events[:2] == ["text_encoder", "-text_encoder"]
        assert sorted(events[2:]) == sorted(set(COMPONENTS) - {"text_encoder"})
        assert picture.tobytes() == other.generate("a cat", **REQUEST)[0].tobytes()
        events.clear()
        assert engine.generate("a cat", **REQUEST)[0].tobytes() == picture.tobytes()
        assert not events  # its text is remembered
        dog = engine.generate("a dog", **REQUEST)[0].tobytes()
        others = sorted(set(COMPONENTS) - {"text_encoder"})
        assert sorted(events[:3]) == [f"-{name}" for name in others]
        assert events[3:5] == ["text_encoder", "-text_encoder"]
        assert sorted(events[5:]) == others
        assert dog == other.generate("a dog", **REQUEST)[0].tobytes()


def test_the_first_error_comes_out_when_all_are_done_and_nothing_stays(opened, cuda: FakeCuda) -> None:
    broken, seen = True, []

    def before(component: str) -> None:
        if broken and component in ("denoiser", "text_projection"):
            time.sleep(0.05 if component == "text_projection" else 0)  # the later one fails first
            raise SanaError(f"{component} is no engine")
        time.sleep(0.1)
        seen.append(component)

    with opened(before) as engine:
        with pytest.raises(SanaError, match="text_projection is no engine"):
            engine.generate("a cat", **REQUEST)
        assert sorted(seen) == ["decoder", "text_encoder"]  # they ended before the error came out
        assert engine._backend._sessions == {}
        broken = False
        assert engine.generate("a cat", **REQUEST)
    assert not cuda.allocations


def test_ctrl_c_waits_for_what_loads(opened, ctrl_c) -> None:
    done = []

    def before(component: str) -> None:
        if component == "decoder":
            os.kill(os.getpid(), signal.SIGINT)  # to the thread that waits
        time.sleep(0.2)
        done.append(component)

    with opened(before) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a cat", **REQUEST)
        assert sorted(done) == sorted(COMPONENTS)
        assert engine._backend._sessions == {}
