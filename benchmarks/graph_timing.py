"""How long work takes the GPU where no launch is waited for: in a CUDA graph."""

import statistics
from collections.abc import Callable, Sequence

import torch

__all__ = ["graph_ms"]

ROUNDS = 20


def graph_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of all calls, one after the other, captured once after each was called once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)
