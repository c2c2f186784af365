"""What the rest is measured by: a GEMM of fixed size on the same device, and how fast memory copies there."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.latency_timing import Task, TorchEvents, cpu_clock
from runtime.ort_session import OrtSession

__all__ = ["CPU_GEMM", "GPU_GEMM", "copy_rate", "cpu_gemm", "gemm_flops", "gemm_rate", "gpu_gemm"]

GPU_GEMM = (4096, 2240, 11200)  # rows, inner, columns: a feed-forward product of Sana-1.6B at 2048 px with guidance
CPU_GEMM = (1024, 1024, 1024)


def gemm_flops(size: tuple[int, int, int]) -> int:
    rows, inner, columns = size
    return 2 * rows * inner * columns


def _name(size: tuple[int, int, int], dtype: str, by: str) -> str:
    return f"GEMM {'x'.join(map(str, size))} {dtype}, {by}"


def gpu_gemm(size: tuple[int, int, int] = GPU_GEMM) -> Task:
    """fp16, sums in fp32, by the library that PyTorch calls."""
    import torch

    rows, inner, columns = size
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(rows, inner, generator=generator, device="cuda", dtype=torch.float16)
    b = torch.randn(inner, columns, generator=generator, device="cuda", dtype=torch.float16)
    out = torch.empty(rows, columns, device="cuda", dtype=torch.float16)
    return Task(_name(size, "fp16", "PyTorch"), lambda: torch.mm(a, b, out=out), TorchEvents())


def cpu_gemm(size: tuple[int, int, int] = CPU_GEMM, *, num_threads: int = 1) -> Task:
    """fp32, in ONNX Runtime with as many threads as a bundle's graphs have: another library's threads would disturb them."""
    import onnx.parser

    rows, inner, columns = size
    text = f'<ir_version: 10, opset_import: ["" : 20]> gemm (float[{rows}, {inner}] a, float[{inner}, {columns}] b) => '
    model = onnx.parser.parse_model(text + f"(float[{rows}, {columns}] c) {{ c = MatMul (a, b) }}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gemm.onnx"
        path.write_bytes(model.SerializeToString())
        session = OrtSession(path, num_threads=num_threads)
    rng = np.random.default_rng(0)
    inputs = {
        "a": rng.standard_normal((rows, inner)).astype(np.float32),
        "b": rng.standard_normal((inner, columns)).astype(np.float32),
    }
    by = f"ONNX Runtime, {num_threads} thread{'s' if num_threads > 1 else ''}"
    return Task(_name(size, "fp32", by), lambda: session.run(inputs), cpu_clock)


def gemm_rate(size: tuple[int, int, int], *, gpu: bool, num_threads: int = 1, least_s: float = 0.1) -> float:
    """FLOP/s of the best of the samples that `least_s` has room for, at least 5. num_threads: of a CPU."""
    task = gpu_gemm(size) if gpu else cpu_gemm(size, num_threads=num_threads)
    began, times = time.perf_counter(), [task.sample().ms]
    while len(times) < 5 or time.perf_counter() - began < least_s:
        found = task.sample()
        times.append(found.ms if gpu else found.wall_ms)
    return gemm_flops(size) / (min(times[1:]) / 1000)


def copy_rate(*, gpu: bool, size: int | None = None, repeats: int = 5) -> float:
    """Bytes a second, those read and those written, of the best of a few copies of `size` bytes (1 GiB on a GPU, 256 MiB else)."""
    if gpu:
        import torch

        source = torch.zeros(size or 1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = Task("copy", lambda: target.copy_(source), TorchEvents())
        best = min(copy.sample().ms for _ in range(repeats)) / 1000
        return 2 * source.numel() / best
    block = np.zeros((size or 256 << 20) // 8)
    block[:] = 1  # so that the pages are there
    other = block.copy()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        np.copyto(other, block)
        best = min(best, time.perf_counter() - began)
    return 2 * block.nbytes / best
