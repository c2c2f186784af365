"""The plans in plugins/ are those that the measured tables in benchmarks/results/ say are fast."""

import json
from pathlib import Path

import pytest

from benchmarks import kernel_plans
from plugins import causal_attention, fp8_quantize, multiscale_projection

RESULTS = Path(kernel_plans.__file__).parent / "results"
TABLES = ("kernel_plans_h200.json", "kernel_plans_text_h200.json", "kernel_plans_end_h200.json")
SLOWER = 1.05  # than the best plan
STATE = {"BLOCK_N": 64, "num_warps": 1, "num_stages": 1}
PARTS = "5 to 7 % by another number of parts for each length; parts are one rule for all lengths"
# By case: a plan that is slower than that, or was not measured, and why it is kept. docs/latency.md has more of each.
KEPT = {
    "LinearAttentionState 2x4096 tokens, 70 heads fp16": ({"part": 512, **STATE}, PARTS),
    "LinearAttentionState 2x16384 tokens, 70 heads fp16": ({"part": 1024, **STATE}, PARTS),
    "LinearAttentionState 2x1024 tokens, 36 heads fp16": ({"part": 128, **STATE}, PARTS),
    "CrossAttention 2x1024 tokens, 20 heads of 112 fp16": (
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        "10 % faster without a pipeline, with which 4096 tokens are 8 % faster; a plan is for all lengths",
    ),
    "Int8Conv3x3Norm 1024x1024x128": (
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        "half of BLOCK_K is 6 % faster, but spills registers where Triton 3.9 compiles it",
    ),
    "MultiscaleProjection 32x32x3072 bf16": (
        {"rows": 16, "E": 128, "num_warps": 2},
        "a channel a thread is faster here, but takes 143 us of 128 x 128 pixels, not 124; a plan is for all sizes",
    ),
}


def table():
    """Rows by the name of their case."""
    rows = [row for name in TABLES for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["kernels"]]
    found = {row["kernel"]: row for row in rows}
    assert len(found) == len(rows), "a case is in two tables, or twice in one"
    return found


def fault(kernel, case, row):
    """What is wrong with the plan in the source, or nothing. kernel: its key in kernel_plans.CASES. row: of the case."""
    plan, kept = dict(case.source), KEPT.get(case.name)
    best = min(row["plans"], key=lambda timed: timed["ms"])
    own = next((timed["ms"] for timed in row["plans"] if timed == {"ms": timed["ms"], **plan}), None)
    fast = own is not None and own <= SLOWER * best["ms"]
    if fast and kept is not None:
        return f"{case.name}: got {plan}, {own} ms, within {SLOWER} of the best, {best}; expected no entry in KEPT. Remove it."
    if fast or (kept is not None and plan == kept[0]):
        return None
    took = "which was not measured" if own is None else f"{own} ms, {own / best['ms']:.3f} of the best"
    return (
        f"{case.name}: got {plan}, {took}; the best is {best}; expected at most {SLOWER} of it. Change the constants in plugins/, "
        f"or measure again: python benchmarks/kernel_plans.py --kernels {kernel} --out FILE; or say in KEPT why it stays."
    )


def faults(kernel, rows):
    """Of the cases that have a row; that all have one is a test of its own."""
    cases = [case for case in kernel_plans.CASES[kernel]() if case.name in rows]
    return [found for case in cases if (found := fault(kernel, case, rows[case.name]))]


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("kernel", kernel_plans.CASES)
def test_plans_are_the_tables_best(kernel):
    assert not (found := faults(kernel, table())), "\n".join(found)


@pytest.mark.usefixtures("on_meta")
def test_every_row_and_exception_has_a_case():
    """Else a case under another name would be held to nothing."""
    names = {case.name for cases in kernel_plans.CASES.values() for case in cases()}
    rows = table().keys()
    assert not names - rows, "no table has these: python benchmarks/kernel_plans.py measures them"
    assert not rows - names, "these rows are of no case: measure their table anew"
    assert not KEPT.keys() - names


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    ("kernel", "module", "constant", "value", "message"),
    [
        ("rotate_heads", causal_attention, "ROTATE_ROWS", 32, "RotateHeads 2x300 bf16: got {'ROWS': 32, 'num_warps': 4}, 0.0"),
        (
            "rotate_heads",
            causal_attention,
            "ROTATE_ROWS",
            64,
            "got {'ROWS': 64, 'num_warps': 4}, which was not measured; the best is",
        ),
        ("fp8_quantize", fp8_quantize, "CHANNELS", 22, "Fp8Quantize 2048x2240 fp16: got {'num_warps': 4}, 0.0"),
        # KEPT has this case with another plan.
        ("multiscale_projection", multiscale_projection, "NUM_WARPS", 4, "got {'rows': 16, 'E': 128, 'num_warps': 4}, 0.0"),
    ],
)
def test_a_worse_plan_in_the_source_is_found(monkeypatch, kernel, module, constant, value, message):
    monkeypatch.setattr(module, constant, value)
    assert message in "\n".join(faults(kernel, table()))


def planted(case, ms, other_ms):
    """Its row: its plan took `ms`, another one `other_ms`."""
    other = {**case.source, "num_warps": 2 * case.source["num_warps"]}
    return {case.name: {"kernel": case.name, "plans": [{"ms": ms, **case.source}, {"ms": other_ms, **other}]}}


@pytest.mark.usefixtures("on_meta")
def test_a_row_decides():
    case = next(kernel_plans.CASES["fp8_quantize"]())
    assert not faults("fp8_quantize", planted(case, 1.04, 1.0))
    (found,) = faults("fp8_quantize", planted(case, 1.06, 1.0))
    assert f"got {case.source}, 1.06 ms, 1.060 of the best; the best is {{'ms': 1.0, " in found
    assert "measure again: python benchmarks/kernel_plans.py --kernels fp8_quantize --out FILE" in found


@pytest.mark.usefixtures("on_meta")
def test_an_exception_that_is_none_any_more_is_found():
    case = next(kernel_plans.CASES["multiscale_projection"]())
    assert not faults("multiscale_projection", planted(case, 1.06, 1.0))
    (found,) = faults("multiscale_projection", planted(case, 1.04, 1.0))
    assert "expected no entry in KEPT. Remove it." in found
