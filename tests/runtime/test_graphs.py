"""A picture's loop as one CUDA graph, and the text encoder that goes after use, on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_tensorrt import FakeCuda, fake_backend

import runtime.trt_backend
from engines.bundle import Bundle
from runtime import SanaEngine
from runtime.cuda import GpuMemoryError
from runtime.graphs import Loops

REQUEST = {"seed": 3, "steps": 4, "width": 96, "negative_prompts": "blue"}


@pytest.fixture
def opened(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SanaEngine]:
    """With another GPU than `cuda` unless cuda_graphs are asked for."""

    def make(bundle, **options):
        return fake_backend(bundle, cuda=cuda if options["cuda_graphs"] else FakeCuda(), **options)

    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", make)
    return lambda **options: SanaEngine(bundle, backend="tensorrt", **options)


def launches(cuda: FakeCuda) -> list[int]:
    return [graph.launches for graph in cuda.graphs]


def test_the_second_picture_of_a_size_is_one_launch(opened, cuda):
    with opened(cuda_graphs=False) as plain:
        wanted = {prompt: plain.generate(prompt, **REQUEST)[0].tobytes() for prompt in ("a red apple", "an owl")}
    with opened(cuda_graphs=True) as engine:
        assert engine.generate("a red apple", **REQUEST)[0].tobytes() == wanted["a red apple"]
        assert launches(cuda) == []
        for number, prompt in enumerate(["an owl", "a red apple", "an owl"], 1):
            assert engine.generate(prompt, **REQUEST)[0].tobytes() == wanted[prompt]
            assert launches(cuda) == [number]
            assert len(engine.last_timings[0].steps_s) == REQUEST["steps"]
    assert all(graph.destroyed for graph in cuda.graphs)


def test_a_text_is_one_launch_from_the_third_on(opened, cuda):
    """The first picture has the arena grow, so the second text is the first with these addresses."""
    prompts, request = (
        ["a red apple", "an owl", "two red apples", "a blue owl"],
        REQUEST | {"guidance": 1.0, "negative_prompts": ""},
    )
    with opened(cuda_graphs=False) as plain:
        wanted = [plain.generate(prompt, **request)[0].tobytes() for prompt in prompts]
    with opened(cuda_graphs=True) as engine:
        assert [engine.generate(prompt, **request)[0].tobytes() for prompt in prompts] == wanted
        assert launches(cuda) == [3, 2]  # of pictures, and of texts
    assert all(graph.destroyed for graph in cuda.graphs)


def test_each_size_and_number_of_steps_has_its_own(opened, cuda):
    requests = [REQUEST, REQUEST | {"steps": 3}, REQUEST | {"height": 128}, REQUEST | {"guidance": 1.0, "negative_prompts": ""}]
    with opened(cuda_graphs=False) as plain:
        wanted = [plain.generate("an owl", **request)[0].tobytes() for request in requests]
    with opened(cuda_graphs=True) as engine:
        for _ in range(3):  # buffers grow in the first round, so that addresses are other ones in the second
            assert [engine.generate("an owl", **request)[0].tobytes() for request in requests] == wanted
        before = sum(launches(cuda))
        assert [engine.generate("an owl", **request)[0].tobytes() for request in requests] == wanted
        assert sum(launches(cuda)) == before + len(requests)


def test_no_graph_is_launched_whose_memory_was_freed(opened, cuda):
    """A longer schedule needs a larger table, which gets the address of the one that was freed for it."""
    wanted = {}
    with opened(cuda_graphs=False) as plain:
        for steps in (3, 9):
            wanted[steps] = plain.generate("an owl", **REQUEST | {"steps": steps})[0].tobytes()
    with opened(cuda_graphs=True) as engine:
        for steps in (3, 3, 9, 3, 3, 9, 9, 3):
            assert engine.generate("an owl", **REQUEST | {"steps": steps})[0].tobytes() == wanted[steps]


def test_an_interrupt_while_loops_are_closed_closes_none_twice(cuda, monkeypatch):
    loops = Loops(cuda)
    for key in "aabb":
        loops.get(key, lambda marks: None)
    destroyed, destroy = [], cuda.destroy_graph

    def interrupted(graph):
        destroy(graph)
        destroyed.append(graph)
        if len(destroyed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cuda, "destroy_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loops.clear()
    loops.clear()
    assert len({id(graph) for graph in destroyed}) == len(destroyed) == 2


def test_whoever_looks_at_the_steps_gets_them_one_by_one(opened, cuda):
    with opened(cuda_graphs=True) as engine:
        for _ in range(3):
            seen = []
            engine.generate("an owl", **REQUEST, on_step=lambda step, total, latents, seen=seen: seen.append((step, total)))
            assert seen == [(step, 4) for step in range(1, 5)]
    assert cuda.graphs == []


def test_progress_is_counted_while_a_graph_runs(opened, cuda, monkeypatch):
    with opened(cuda_graphs=True) as engine:
        backend, ticks = engine._backend, []
        draw = backend.draw

        def counted(job, on_step, tick):
            return draw(job, on_step, lambda: (ticks.append(cuda.settled), tick()))

        monkeypatch.setattr(backend, "draw", counted)
        for _ in range(2):
            ticks.clear()
            engine.generate("an owl", **REQUEST)
            assert len(ticks) == REQUEST["steps"]
        assert launches(cuda) == [1]
        assert ticks[0] is False, "the first step was counted while there was work left"


def test_an_interrupted_graph_leaves_a_working_engine(opened, cuda, monkeypatch):
    with opened(cuda_graphs=True) as engine:
        first = engine.generate("an owl", **REQUEST)[0].tobytes()
        backend = engine._backend
        draw = backend.draw

        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr(backend, "draw", lambda job, on_step, tick: draw(job, on_step, interrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.generate("an owl", **REQUEST)
        assert cuda.settled
        monkeypatch.setattr(backend, "draw", draw)
        assert engine.generate("an owl", **REQUEST)[0].tobytes() == first


def test_full_memory_drops_the_graphs(opened, cuda):
    with opened(cuda_graphs=True) as engine:
        first = [engine.generate("an owl", **REQUEST)[0].tobytes() for _ in range(2)][1]
        cuda.memory = sum(size for _, size in cuda.allocations.values()) + 1000
        with pytest.raises(GpuMemoryError):
            engine.generate("an owl", **REQUEST | {"width": 128, "height": 128})
        assert all(graph.destroyed for graph in cuda.graphs)
        cuda.memory = 1 << 30
        assert [engine.generate("an owl", **REQUEST)[0].tobytes() for _ in range(2)] == [first, first]


def test_a_bounded_number_is_kept():
    cuda = FakeCuda()
    loops = Loops(cuda, limit=2)
    for key in "aabb":
        loops.get(key, lambda marks: None)
    assert [graph.destroyed for graph in cuda.graphs] == [False, False]
    loops.get("a", lambda marks: None)  # the one used latest stays
    loops.get("c", lambda marks: None)
    assert [graph.destroyed for graph in cuda.graphs] == [False, True]
    assert loops.get("b", lambda marks: None) is None, "b is new again"
    loops.clear()
    assert all(graph.destroyed for graph in cuda.graphs)


def test_work_that_cannot_be_captured_is_said(opened, cuda, monkeypatch):
    with opened(cuda_graphs=True) as engine:
        engine.generate("an owl", **REQUEST)
        monkeypatch.setattr(cuda, "capture", lambda work: (_ for _ in ()).throw(RuntimeError("no capture")))
        with pytest.raises(RuntimeError, match="no capture"):
            engine.generate("an owl", **REQUEST)
        monkeypatch.undo()


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_low_memory_unloads_the_text_encoder(bundle, monkeypatch, backend):
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", fake_backend)
    with SanaEngine(bundle, backend=backend) as plain:
        wanted = [plain.generate(prompt, **REQUEST)[0].tobytes() for prompt in ("a red apple", "an owl")]
        assert "text_encoder" in plain._backend._sessions
    with SanaEngine(bundle, backend=backend, low_memory=True) as engine:
        assert [engine.generate(prompt, **REQUEST)[0].tobytes() for prompt in ("a red apple", "an owl")] == wanted
        assert "text_encoder" not in engine._backend._sessions
        assert engine.generate("an owl", **REQUEST)[0].tobytes() == wanted[1]
