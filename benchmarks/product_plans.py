"""Times cuBLASLt's algorithms for Sana's FP8 products on the GPU that is here, beside the one that engines take.

    python benchmarks/product_plans.py --out benchmarks/results/product_plans_h200.json

For products of a block of Sana-1.6B and 0.6B: microseconds in a CUDA graph of every algorithm that cuBLASLt's heuristic names where
x and w have a scale a row each, as those of engines have (plugins/cublas_lt.py takes the first), and where each has one for all of
it; and of the latter's with a scale a row, if cuBLASLt runs them so. The best is that of the right ones: with a mean square error
at most four times the first's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from ctypes import byref, c_int32, c_size_t, c_uint16, c_uint32, sizeof
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import machine, versions
from benchmarks.graph_timing import graph_ms
from plugins import cublas_lt

TOKENS = 2048  # 1024 px, two texts
DIMS = (2240, 1152)  # of Sana-1.6B, Sana-0.6B
SIZES = tuple((TOKENS, columns, depth) for d in DIMS for columns, depth in ((d, d), (3 * d, d), (5 * d, d), (d, d * 5 // 2)))
CALLS = 8  # in a graph
ANSWERS = 64  # that the heuristic is asked for
ROW, MATRIX = "a scale a row", "a scale a matrix"
TILES = {18: "128x64", 19: "64x256", 20: "128x128", 23: "128x256", 24: "256x128", 28: "96x128", 29: "128x160", 31: "192x128",
         184: "144x128", 197: "168x128", 201: "176x128", 209: "192x192", 458: "192x96"}  # fmt: skip
_CONFIG = {"id": (0, c_uint32), "tile": (1, c_uint32), "custom": (5, c_uint32), "stages": (6, c_uint32), "cluster": (8, c_uint16)}


@dataclass
class Bench:
    """A product's inputs, its right result, and the description for one of ROW and MATRIX."""

    size: tuple[int, int, int]
    scales: str

    def __post_init__(self) -> None:
        rows, columns, depth = self.size
        generator = torch.Generator("cuda").manual_seed(depth)
        x, w = (torch.randn(n, depth, device="cuda", generator=generator) for n in (rows, columns))
        self.x, self.w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        self.x_scale, self.w_scale = (0.5 + torch.rand(n, device="cuda", generator=generator) for n in (rows, columns))
        self.bias = torch.randn(columns, device="cuda", generator=generator).half()
        self.out = torch.empty(rows, columns, device="cuda", dtype=torch.half)
        self.workspace = torch.empty(cublas_lt.WORKSPACE, device="cuda", dtype=torch.uint8)
        by_row = self.scales == ROW
        x_scale, w_scale = (s if by_row else s[:1] for s in (self.x_scale, self.w_scale))
        exact = (self.x.double() * x_scale.double()[:, None]) @ (self.w.double() * w_scale.double()[:, None]).T
        self.exact = exact + self.bias.double()
        self.product = cublas_lt.Product("fp8", bias=True, context_id=1)
        if not by_row:
            for mode in cublas_lt._SCALE_MODES:
                self.product._describe(mode, c_int32(0))
        candidates, cublas_lt.CANDIDATES = cublas_lt.CANDIDATES, ANSWERS
        try:
            self.product.prepare(*self.size)
        finally:
            cublas_lt.CANDIDATES = candidates
        self.answers = list(self.product._candidates)

    def __call__(self) -> None:
        x, w, bias, out, workspace = (t.data_ptr() for t in (self.x, self.w, self.bias, self.out, self.workspace))
        scales = {"x_scale": self.x_scale.data_ptr(), "w_scale": self.w_scale.data_ptr()}
        self.product.run(x, w, bias, out, workspace, torch.cuda.current_stream().cuda_stream, **scales)

    def accepts(self, algorithm: Any) -> Any:
        """The algorithm as cuBLASLt would run it here, or None."""
        w, x, out = self.product._layouts
        found = cublas_lt._Heuristic()
        status = cublas_lt._library().cublasLtMatmulAlgoCheck(
            self.product._lt, self.product._description, w, x, out, out, byref(algorithm), byref(found)
        )
        found.algo = algorithm.algo
        return None if status or found.state or found.workspace > cublas_lt._USABLE else found

    def measured(self, algorithm: Any) -> dict[str, Any]:
        """us and the root mean square error, or why there are none."""
        self.product._candidates = [algorithm]
        self.out.fill_(torch.nan)
        try:
            us = 1000 * graph_ms([self] * CALLS) / CALLS
        except cublas_lt.CublasError as error:
            return {"refused": str(error)}
        return {"us": round(us, 2), "rms": (self.out.double() - self.exact).pow(2).mean().sqrt().item()}


def config(algorithm: Any) -> dict[str, int | str]:
    """What cuBLASLt calls the algorithm's parts (cublasLt.h, CUBLASLT_ALGO_CONFIG_…)."""
    found: dict[str, int | str] = {}
    for name, (attribute, kind) in _CONFIG.items():
        value, written = kind(), c_size_t()
        get = cublas_lt._library().cublasLtMatmulAlgoConfigGetAttribute
        if not get(byref(algorithm), attribute, byref(value), c_size_t(sizeof(value)), byref(written)):
            found[name] = TILES.get(value.value, value.value) if name == "tile" else value.value
    return found


def rows(size: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    by_row, by_matrix = Bench(size, ROW), Bench(size, MATRIX)
    for bench, answers in ((by_row, by_row.answers), (by_matrix, by_matrix.answers)):
        for place, algorithm in enumerate(answers):
            yield {
                "scales": bench.scales,
                "named for": bench.scales,
                "place": place,
                **config(algorithm),
                **bench.measured(algorithm),
            }
    for place, algorithm in enumerate(by_matrix.answers):
        if (accepted := by_row.accepts(algorithm)) is None:
            yield {"scales": ROW, "named for": MATRIX, "place": place, **config(algorithm), "refused": "cublasLtMatmulAlgoCheck"}
        else:
            yield {"scales": ROW, "named for": MATRIX, "place": place, **config(algorithm), **by_row.measured(accepted)}


def summary(found: list[dict[str, Any]]) -> list[str]:
    """A line for each way."""
    lines = []
    for scales, named in ((ROW, ROW), (MATRIX, MATRIX), (ROW, MATRIX)):
        first = next(row for row in found if row["scales"] == row["named for"] == scales and row["place"] == 0)
        tried = [row for row in found if (row["scales"], row["named for"]) == (scales, named)]
        right = [row for row in tried if row.get("rms", math.nan) <= 2 * first.get("rms", math.nan)]
        best = min(right, key=lambda row: float(row["us"]), default=None)
        what = f"best {best['us']} us, {best.get('tile')}, place {best['place']}" if best else "none is right"
        count = f"{len(right)} of {len(tried)} run and are right"
        lines.append(f"{scales}, algorithms for {named}: first {tried[0].get('us')} us; {what}; {count}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("got no GPU; expected one: algorithms are measured")
    found = {}
    for size in SIZES:
        name = " x ".join(map(str, size))
        found[name] = list(rows(size))
        print(f"{name} (tokens x columns x depth)", *summary(found[name]), sep="\n  ", flush=True)
    if options.out:
        record = {"machine": machine(), "versions": versions(), "products": found}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
