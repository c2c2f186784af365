"""Times Sana's products by a Triton kernel beside cuBLASLt's that engines take, in FP8 and fp16, on the GPU that is here.

    python benchmarks/product_by_triton.py --out benchmarks/results/product_by_triton_h200.json

out = (x w^T) x_scale w_scale + bias, with a scale for each row of x and of w in FP8 and none in fp16; sums in fp32, as `tl.dot` and
cuBLASLt's fast accumulation make them. Microseconds in a CUDA graph. The kernel is Triton's usual one for products: blocks in
groups that share what the L2 cache holds, loads under way, sums in registers. Of BLOCKS the fastest that is right counts: with at
most twice cuBLASLt's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.figures import machine, versions, write_result
from benchmarks.graph_timing import graph_ms
from benchmarks.product_plans import CALLS, SIZES, file_to_write
from plugins import cublas_lt

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, w, bias, x_scale, w_scale
DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}
GROUP = 8  # blocks of rows that share blocks of w
# rows, columns and depth of a block, warps, loads under way
BLOCKS = (
    (64, 128, 128, 4, 4), (64, 256, 128, 4, 3), (128, 128, 64, 4, 4), (128, 128, 128, 4, 3), (128, 128, 128, 4, 4),
    (128, 128, 128, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 128, 8, 3), (256, 128, 64, 8, 3),
    (256, 128, 128, 8, 3),
)  # fmt: skip


@triton.jit
def kernel(
    x,
    w,
    bias,
    x_scale,
    w_scale,
    out,
    M,
    N,
    K,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x (M, K), w (N, K), bias (N,), x_scale (M,), w_scale (N,), out (M, N), all contiguous."""
    program = tl.program_id(0)
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * across)
    first = group * GROUP_M
    high = min(down - first, GROUP_M)
    row = first + program % (GROUP_M * across) % high
    column = program % (GROUP_M * across) // high
    rows, columns = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    depths = tl.arange(0, BLOCK_K)
    x_at = x + (rows % M)[:, None] * K + depths[None, :]  # rows beyond the last are read again, and not written
    w_at = w + (columns % N)[None, :] * K + depths[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        live = depths < K - k
        a = tl.load(x_at, mask=live[None, :], other=0.0)
        b = tl.load(w_at, mask=live[:, None], other=0.0)
        sums = tl.dot(a, b, sums)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if SCALED:
        sums *= tl.load(x_scale + rows % M)[:, None] * tl.load(w_scale + columns % N)[None, :]
    sums += tl.load(bias + columns % N).to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], sums.to(out.dtype.element_ty), mask=inside)


def product(
    blocks: tuple[int, int, int, int, int], x: Tensor, w: Tensor, bias: Tensor, x_scale: Tensor, w_scale: Tensor, out: Tensor
) -> None:
    """One call of the kernel; shapes are its."""
    m, n, k, num_warps, num_stages = blocks
    (rows, depth), columns = x.shape, w.shape[0]
    grid = (triton.cdiv(rows, m) * triton.cdiv(columns, n),)
    kernel[grid](
        x, w, bias, x_scale, w_scale, out, rows, columns, depth, SCALED=x.dtype == torch.float8_e4m3fn,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=GROUP, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def operands(size: tuple[int, int, int], dtype: str, device: str = "cuda") -> tuple[Operands, Tensor]:
    """The kernel's inputs for rows, columns and depth, and the exact result (fp64)."""
    rows, columns, depth = size
    generator = torch.Generator(device).manual_seed(depth)
    x, w = (torch.randn(n, depth, device=device, generator=generator).to(DTYPES[dtype]) for n in (rows, columns))
    x_scale, w_scale = (0.5 + torch.rand(n, device=device, generator=generator) for n in (rows, columns))
    bias = torch.randn(columns, device=device, generator=generator).half()
    exact = x.double() @ w.double().T
    if dtype == "fp8":
        exact *= x_scale.double()[:, None] * w_scale.double()
    return (x, w, bias, x_scale, w_scale), exact + bias.double()


def _measured(call: Callable[[], object], out: Tensor, exact: Tensor) -> dict[str, Any]:
    """us, and the error (root mean square, of the result's)."""
    out.fill_(torch.nan)
    us = 1000 * graph_ms([call] * CALLS) / CALLS
    return {"us": round(us, 2), "error": float((out.double() - exact).norm() / exact.norm())}


def measured(size: tuple[int, int, int], dtype: str) -> Iterator[dict[str, Any]]:
    """cuBLASLt's, then the kernel's with each of BLOCKS."""
    inputs, exact = operands(size, dtype)
    out = torch.empty(*exact.shape, device="cuda", dtype=torch.half)
    workspace = torch.empty(cublas_lt.WORKSPACE, device="cuda", dtype=torch.uint8)
    library = cublas_lt.Product(dtype, bias=True, context_id=1)
    library.prepare(*size)
    x, w, bias, x_scale, w_scale = (tensor.data_ptr() for tensor in inputs)
    scales = {"x_scale": x_scale, "w_scale": w_scale} if dtype == "fp8" else {}

    def by_library() -> None:
        library.run(x, w, bias, out.data_ptr(), workspace.data_ptr(), torch.cuda.current_stream().cuda_stream, **scales)

    yield {"by": "cuBLASLt", **_measured(by_library, out, exact)}
    library.close()
    for blocks in BLOCKS:
        way = {"by": "Triton", "blocks": blocks}
        try:
            yield way | _measured(partial(product, blocks, *inputs, out), out, exact)
        except OutOfResources as error:
            yield way | {"refused": str(error)}


def summary(rows: list[dict[str, Any]]) -> str:
    library, others = rows[0], rows[1:]
    right = [row for row in others if row.get("error", float("nan")) <= 2 * library["error"]]
    if not right:
        return f"cuBLASLt {library['us']} us; Triton: none is right"
    best = min(right, key=lambda row: float(row["us"]))
    blocks = "{} x {} x {}, {} warps, {} stages".format(*best["blocks"])
    return f"cuBLASLt {library['us']} us; Triton {best['us']} ({blocks}), {best['us'] / library['us']:.2f} times as long"


def main() -> int:
    out = file_to_write(__doc__)
    found: dict[str, list[dict[str, Any]]] = {}
    for size in SIZES:
        for dtype in DTYPES:
            name = f"{' x '.join(map(str, size))}, {dtype}"
            found[name] = list(measured(size, dtype))
            print(f"{name}: {summary(found[name])}", flush=True)
    if out:
        write_result(out, {"machine": machine(), "versions": versions(), "products": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
