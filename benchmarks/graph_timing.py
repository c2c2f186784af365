"""How long work takes the GPU where no launch is waited for: in a CUDA graph."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

__all__ = ["captured", "graph_ms"]

ROUNDS = 20


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls, one after the other, as one launch. Each is called once before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return partial(_replay, graph, calls)


def _replay(graph: torch.cuda.CUDAGraph, calls: Sequence[Callable[[], object]]) -> None:
    """calls: they hold the tensors that the graph reads."""
    graph.replay()


def graph_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of all calls, one after the other, captured once after each was called once."""
    replay, times = captured(calls), []
    for _ in range(ROUNDS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)
