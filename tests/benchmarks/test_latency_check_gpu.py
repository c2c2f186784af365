"""The decision between slower and noise, where the work, the yardstick and the clock are a GPU's own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.graph_timing import captured, graph_ms
from benchmarks.latency_check import Limits, Verdict, compare
from benchmarks.latency_run import YARDSTICK_SHARE, Plan
from benchmarks.latency_timing import Rounds, Task, TorchEvents, calls_for, interleave
from benchmarks.latency_yardstick import gpu_gemm

PRODUCT = (2048, 2048, 2048)  # about 30 us of an H200
PART = 20  # products, to which one more is 5 %
LEAST_MS = 2.0  # of the work: 5 % of it are several times Limits.floor_ms


def measured(task: Task, yardstick: Task, plan: Plan) -> Rounds:
    """By turns, as latency_run.measure() does."""
    task = replace(task, calls=calls_for(task, plan.least_ms))
    least_ms = max(plan.least_ms, YARDSTICK_SHARE * task.sample().wall_ms * task.calls)
    references = [replace(yardstick, calls=calls_for(yardstick, least_ms))]
    return interleave(task, references, rounds=plan.rounds, warm_up=plan.warm_up)


def verdict(now: Rounds, then: Rounds, name: str) -> Verdict:
    yardstick_ms = float(np.median(now.references[name]))
    return compare(now.ratios(name), then.ratios(name), yardstick_ms=yardstick_ms, limits=Limits())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_product_more_in_twenty_is_slower_and_the_same_work_is_not() -> None:
    yardstick, product = gpu_gemm(), gpu_gemm(PRODUCT).call
    parts = math.ceil(1.5 * LEAST_MS / graph_ms([product] * PART))
    same, slower = (
        Task(f"{parts} x {size} products", captured([product] * (parts * size)), TorchEvents()) for size in (PART, PART + 1)
    )
    measured(same, yardstick, Plan())  # until the GPU is as warm, and its clock as low, as behind it
    then, again, more = (measured(task, yardstick, Plan()) for task in (same, same, slower))
    assert np.median([sample.ms for sample in then.samples]) >= LEAST_MS
    noise, planted = (verdict(now, then, yardstick.name) for now in (again, more))
    assert not noise.regression, f"the same work: got {noise}; expected no regression"
    assert planted.regression, f"a product more in {PART}: got {planted}; expected a regression"
