"""Products by Triton beside cuBLASLt's."""

import json

import pytest
import torch
from parity.interpreter import run_interpreted

from benchmarks import product_by_triton
from benchmarks.product_by_triton import BLOCKS, summary
from benchmarks.product_plans import CAPABILITY

# 32 rows, columns and depth divide none of the sizes. The bound: twice what rounding to fp16 errs, evenly spread.
CODE = """
import torch
from benchmarks.product_by_triton import DTYPES, operands, product
for dtype in DTYPES:
    inputs, exact = operands((70, 48, 80), dtype, "cpu")
    out = torch.full(exact.shape, torch.nan, dtype=torch.half)
    product((32, 32, 32, 4, 2), *inputs, out)
    error = float((out.double() - exact).norm() / exact.norm())
    assert error < 2 * 2**-11 / 3**0.5, (dtype, error)
"""


@pytest.mark.slow
def test_it_is_the_product():
    run_interpreted(CODE)


def test_what_is_wrong_or_did_not_run_is_not_the_best():
    ways = [{"by": "Triton", "blocks": blocks} for blocks in BLOCKS[:4]]
    rows = [
        {"by": "cuBLASLt", "us": 20.0, "error": 1e-3},
        ways[0] | {"us": 10.0, "error": 3e-3},
        ways[1] | {"refused": "out of resource"},
        ways[2] | {"us": 12.0, "error": float("nan")},
        ways[3] | {"us": 25.0, "error": 1e-3},
    ]
    assert summary(rows) == "cuBLASLt 20.0 us; Triton 25.0 (128 x 128 x 128, 4 warps, 3 stages), 1.25 times as long"
    assert summary(rows[:-1]) == "cuBLASLt 20.0 us; Triton: none is right"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
    reason="needs a GPU of compute capability 9.0, where engines multiply with cuBLASLt",
)
def test_both_are_right(monkeypatch, tmp_path):
    out = tmp_path / "products.json"
    monkeypatch.setattr(product_by_triton, "SIZES", [(2048, 2240, 2240)])
    monkeypatch.setattr(product_by_triton, "BLOCKS", (BLOCKS[0], BLOCKS[2]))  # both fit a multiprocessor in fp16, too
    monkeypatch.setattr("sys.argv", ["product_by_triton.py", "--out", str(out)])
    assert product_by_triton.main() == 0
    products = json.loads(out.read_text())["products"]
    assert len(products) == 2
    for rows in products.values():
        assert [row["by"] for row in rows] == ["cuBLASLt", "Triton", "Triton"]
        for row in rows:
            assert row["us"] > 0
            assert row["error"] <= 2 * rows[0]["error"] < 0.01
