"""The attention that can round its state: with nothing rounded it is the reference's, tile by tile as at once."""

from dataclasses import replace

import pytest
import torch
from tiny_build import quiet, tiny
from tiny_recipes import recipe

from benchmarks.attention_state import PROJECTIONS, attention, cases, geometric, quantized_state, results, summary
from engines.store import Store
from export.calibration_data import draw_all, plan_runs
from sana_ref import ops
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference


def draw(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 40, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize("tile", [None, 16, 7, 64])
def test_with_nothing_rounded_it_is_the_reference(tile):
    q, k, v = draw(0)
    exact = ops.relu_linear_attention_truth(q.double(), k.double(), v.double())
    same = (ops.relu_linear_attention_truth(q, k, v) - exact).abs().max()
    with quantized_state("int8", (), tile):
        got = ops.relu_linear_attention(q, k, v)
    assert (got - exact).abs().max() <= 4 * same  # sums of tiles round once more


def test_only_what_is_named_is_rounded_and_the_op_comes_back():
    q, k, v = draw(1)
    seen = []
    attention(q, k, v, state=lambda x: seen.append(x.shape) or x, normaliser=lambda x: seen.append(x.shape) or x, tile=20)
    assert seen == [(2, 3, 8, 8), (2, 3, 1, 8)] * 2
    original = ops.relu_linear_attention
    exact = original(q, k, v)
    with quantized_state("fp8", ("state",)):
        state = ops.relu_linear_attention(q, k, v)
    with pytest.raises(KeyError), quantized_state("fp8", ("state",)):
        raise KeyError
    assert ops.relu_linear_attention is original
    assert 0 < (state - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.slow
def test_errors_of_runs_and_what_is_said_of_them(tmp_path):
    reference, store = SanaReference(load(tiny())), Store(tmp_path)
    runs = draw_all(reference, plan_runs(reference.checkpoint, recipe().calibration), store, quiet())
    found = results(reference, runs, store, quiet())
    assert {(name, kind) for name, kind, _ in cases(reference)} == {(name, kind) for name in found for kind in found[name]}
    assert all(len(errors) == len(runs) and min(errors) > 0 for kinds in found.values() for errors in kinds.values())
    wrong = [replace(run, latents=run.latents * float("nan")) for run in runs]  # would show, were anything computed again
    assert results(reference, wrong, store, quiet()) == found
    said = summary(found)
    assert "of_projections" not in said[PROJECTIONS]["int8"]
    entry = said["state, once"]["fp8"]
    assert entry["runs"] == found["state, once"]["fp8"]
    assert entry["of_projections"]["low"] <= entry["of_projections"]["mean"] <= entry["of_projections"]["high"]


def test_means_are_of_logarithms():
    """Twice the error in every run is twice the error, however much runs differ."""
    errors = {PROJECTIONS: {"int8": [1.0, 2.0, 1000.0]}, "state, once": {"int8": [2.0, 4.0, 2000.0]}}
    times = summary(errors)["state, once"]["int8"]["of_projections"]  # type: ignore[arg-type]
    assert [times[part] for part in ("mean", "low", "high")] == pytest.approx([2.0, 2.0, 2.0])
    wide = geometric([1.0, 100.0, 1.0, 100.0])
    assert wide.mean == pytest.approx(10.0)
    assert wide.low < wide.mean < wide.high
