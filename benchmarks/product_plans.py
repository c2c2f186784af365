"""Times cuBLASLt's algorithms for Sana's FP8 products on the GPU that is here, beside the one that engines take.

    python benchmarks/product_plans.py --out benchmarks/results/product_plans_h200.json

For products of a block of Sana-1.6B and 0.6B: microseconds in a CUDA graph of every algorithm that cuBLASLt's heuristic names where
x and w have a scale a row each, as those of engines have, and where each has one for all of it; and of the second's with scales a
row. The best is that of the right ones: with at most twice the error of the heuristic's first. Engines take what
plugins/cublas_lt.py prepares.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from ctypes import byref, c_size_t, c_uint16, c_uint32, sizeof
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import machine, versions, write_result
from benchmarks.graph_timing import graph_ms
from benchmarks.writable import writable_file
from plugins import cublas_lt

CAPABILITY = (9, 0)  # the only one for which cuBLASLt has a scale a row
TOKENS = (512, 2048, 8192)  # 512, 1024 and 2048 px, two texts
DIMS = (2240, 1152)  # of Sana-1.6B, Sana-0.6B
SIZES = tuple(
    (n, columns, depth) for n in TOKENS for d in DIMS for columns, depth in ((d, d), (3 * d, d), (5 * d, d), (d, d * 5 // 2))
)
CALLS = 8  # in a graph
ANSWERS = 64  # that the heuristic is asked for
ROW, MATRIX, ENGINES = "a scale a row", "a scale a matrix", "engines"
SCALES = {ROW: cublas_lt.A_NUMBER_A_ROW, MATRIX: cublas_lt.A_NUMBER}
WAYS = ((ROW, ROW), (MATRIX, MATRIX), (ROW, MATRIX), (ROW, ENGINES))  # scales, and for which, or by what, algorithms were named
TILES = {18: "128x64", 19: "64x256", 20: "128x128", 23: "128x256", 24: "256x128", 28: "96x128", 29: "128x160", 31: "192x128",
         184: "144x128", 197: "168x128", 201: "176x128", 209: "192x192", 458: "192x96"}  # fmt: skip
_CONFIG = {"id": (0, c_uint32), "tile": (1, c_uint32), "custom": (5, c_uint32), "stages": (6, c_uint32), "cluster": (8, c_uint16)}


@dataclass
class Bench:
    """A product's inputs, its right result, and the description for one of SCALES."""

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
        x_scale, w_scale = (scale if self.scales == ROW else scale[:1] for scale in (self.x_scale, self.w_scale))
        exact = (self.x.double() * x_scale.double()[:, None]) @ (self.w.double() * w_scale.double()[:, None]).T
        self.exact = exact + self.bias.double()
        self.product = cublas_lt.Product("fp8", bias=True, context_id=1)
        self.product.prepare(*self.size)
        self.prepared = self.product.candidates
        self.product.scale_by(SCALES[self.scales])
        self.named = self.product.named(ANSWERS)

    def __call__(self) -> None:
        x, w, bias, out, workspace = (t.data_ptr() for t in (self.x, self.w, self.bias, self.out, self.workspace))
        scales = {"x_scale": self.x_scale.data_ptr(), "w_scale": self.w_scale.data_ptr()}
        self.product.run(x, w, bias, out, workspace, torch.cuda.current_stream().cuda_stream, **scales)

    def measured(self, algorithm: Any) -> dict[str, Any]:
        """us and the error (root mean square, of the result's), or why there are none."""
        self.product.candidates = [algorithm]
        self.out.fill_(torch.nan)
        try:
            us = 1000 * graph_ms([self] * CALLS) / CALLS
        except cublas_lt.CublasError as error:
            return {"refused": str(error)}
        off = (self.out.double() - self.exact).norm() / self.exact.norm()
        return {"us": round(us, 2), "error": off.item()}


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
    benches = {scales: Bench(size, scales) for scales in SCALES}
    for scales, named in WAYS:
        bench = benches[scales]
        for place, algorithm in enumerate(bench.prepared[:1] if named == ENGINES else benches[named].named):
            way = {"scales": scales, "named for": named, "place": place, **config(algorithm)}
            accepted = bench.product.checked(algorithm) if (scales, named) == (ROW, MATRIX) else algorithm
            yield way | (bench.measured(accepted) if accepted is not None else {"refused": "cublasLtMatmulAlgoCheck"})


def summary(found: list[dict[str, Any]]) -> list[str]:
    """A line for each way."""
    lines = []
    own = next(row for row in found if (row["scales"], row["named for"], row["place"]) == (ROW, ROW, 0))
    for scales, named in WAYS:
        tried = [row for row in found if (row["scales"], row["named for"]) == (scales, named)]
        right = [row for row in tried if row.get("error", math.nan) <= 2 * own["error"]]
        best = min(right, key=lambda row: float(row["us"]), default=None)
        what = f"best {best['us']} us, {best.get('tile')}, place {best['place']}" if best else "none is right"
        first = f"first {tried[0].get('us')} us; " if tried else ""
        whose = f"algorithms {'of' if named == ENGINES else 'for'} {named}"
        lines.append(f"{scales}, {whose}: {first}{what}; {len(right)} of {len(tried)} run and are right")
    return lines


def file_to_write(description: str | None) -> Path | None:
    """What the command line says; it ends with an error, too, on a GPU where engines do not multiply with cuBLASLt."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=writable_file, help="a JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("got no GPU; expected one: products are measured")
    if (capability := torch.cuda.get_device_capability()) != CAPABILITY:
        parser.error(f"got a GPU of compute capability {capability}; expected {CAPABILITY}, where engines multiply with cuBLASLt")
    out: Path | None = options.out
    return out


def main() -> int:
    out = file_to_write(__doc__)
    found = {}
    for size in SIZES:
        name = " x ".join(map(str, size))
        found[name] = list(rows(size))
        print(f"{name} (tokens x columns x depth)", *summary(found[name]), sep="\n  ", flush=True)
    if out:
        write_result(out, {"machine": machine(), "versions": versions(), "products": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
