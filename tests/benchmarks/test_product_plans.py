"""Algorithms of cuBLASLt, timed."""

import json

import pytest
import torch

from benchmarks import product_by_triton, product_plans
from benchmarks.product_plans import ENGINES, MATRIX, ROW


@pytest.mark.parametrize(
    ("capability", "message"), [(None, "got no GPU; expected one"), ((8, 9), r"capability (8, 9); expected (9, 0)")]
)
@pytest.mark.parametrize("program", [product_plans, product_by_triton])
def test_refused(monkeypatch, capsys, program, capability, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("sys.argv", ["a program"])
    with pytest.raises(SystemExit):
        program.main()
    assert message in capsys.readouterr().err


def test_where_nothing_can_be_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["product_plans.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        product_plans.main()
    assert f"argument --out: the file: got {tmp_path}, which is a folder" in capsys.readouterr().err


def test_the_sizes_are_those_of_a_block():
    assert product_plans.SIZES[8] == (2048, 2240, 2240)
    assert (2048, 11200, 2240) in product_plans.SIZES
    assert (2048, 1152, 2880) in product_plans.SIZES


def test_what_is_wrong_is_not_the_best():
    def row(scales, named, place, **result):
        return {"scales": scales, "named for": named, "place": place, "tile": f"tile {place}", **result}

    found = [
        row(ROW, ROW, 0, us=20.0, error=0.1),
        row(MATRIX, MATRIX, 0, us=15.0, error=0.1),
        row(MATRIX, MATRIX, 1, us=14.0, error=0.11),
        row(ROW, MATRIX, 0, us=5.0, error=3.0),
        row(ROW, MATRIX, 1, refused="no"),
        row(ROW, MATRIX, 2, us=16.0, error=0.1),
        row(ROW, MATRIX, 3, us=6.0, error=float("nan")),
    ]
    by_row, by_matrix, mixed, none = product_plans.summary(found)
    assert "first 20.0 us; best 20.0 us, tile 0" in by_row
    assert "first 15.0 us; best 14.0 us, tile 1, place 1; 2 of 2" in by_matrix
    assert "first 5.0 us; best 16.0 us, tile 2, place 2; 1 of 4 run and are right" in mixed
    assert none == f"{ROW}, algorithms of {ENGINES}: none is right; 0 of 0 run and are right"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != product_plans.CAPABILITY,
    reason="needs a GPU of compute capability 9.0, for which alone cuBLASLt has a scale a row",
)
def test_the_engines_own_is_right(monkeypatch, tmp_path):
    out = tmp_path / "plans.json"
    monkeypatch.setattr(product_plans, "SIZES", product_plans.SIZES[8:9])
    monkeypatch.setattr("sys.argv", ["product_plans.py", "--out", str(out)])
    assert product_plans.main() == 0
    (rows,) = json.loads(out.read_text())["products"].values()
    assert [rows[at]["named for"] for at in (0, -1)] == [ROW, ENGINES]
    for row in (rows[0], rows[-1]):
        assert row["scales"] == ROW
        assert row["us"] > 0
        assert row["error"] < 0.01
