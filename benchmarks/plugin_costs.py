"""What each launch of a plugin computes and moves, and which of the kernels that CUPTI saw it is.

The shell in Python (plugins/work.py) knows op and shapes of whatever it launches. A GPU runs launches of one stream in their order,
so the n-th kernel of a name is the n-th launch of that name; a product's kernels have cuBLASLt's names. Of the shell in C++ nothing
is known (SANA_PLUGINS=python).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.latency_history import Kernel
from plugins.launch import Launch, evaluate
from plugins.work import KernelWork, ProductWork

__all__ = ["Launched", "attributed", "cost", "launches"]

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int32": 4, "int64": 8, "int8": 1, "uint8": 1, "bool": 1}
CONVOLUTIONS = re.compile(r"(Fp8|Int8)?Conv3x3|GatedDepthwiseConv")  # x (B, H, W, channels) and weight, of which a pixel meets all
OF_A_BLOCK = {"CrossAttention": (1, 2)}  # inputs that have all blocks' keys and values, of which one block's are read
OF_QKV = {"LinearAttentionState": 2, "LinearAttentionApply": 1}  # thirds of the first input that are read: k and v; q
PRODUCT = ""  # in place of a kernel's name
PRODUCTS = re.compile(r"nvjet|gemm|cutlass|xmma", re.IGNORECASE)  # names of cuBLASLt's kernels


@dataclass(frozen=True)
class Launched:
    kernel: str  # its entry, or PRODUCT
    op: str
    flops: int
    bytes: int


def cost(launch: Launch, dims: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """FLOPs of products, convolutions and attention, 0 of others; bytes of all that is read and written once. dims: of inputs.

    Those of Conv3x3Upsample are the model's: of repeated pixels the kernel leaves out five taps of nine, of which the launch says
    nothing.
    """
    size = sum(math.prod(evaluate(n, dims) for n in output.shape) * ITEM_BYTES[output.type] for output in launch.outputs)
    for number, (kind, shape) in enumerate(zip(launch.inputs, dims, strict=True)):
        count = math.prod(shape[1:] if number in OF_A_BLOCK.get(launch.op, ()) else shape)
        if number == 0 and launch.op in OF_QKV:
            count = count // 3 * OF_QKV[launch.op]
        elif (launch.op, number) == ("RotateHeads", 0):  # qkv, of which v is not turned
            count = math.prod(evaluate(n, dims) for n in launch.outputs[0].shape)
        elif (launch.op, number) == ("CausalAttention", 1):  # of qkv v alone, which turned has not
            count -= math.prod(dims[0])
        size += count * ITEM_BYTES[kind]
    if launch.product is not None:
        sizes = launch.product
        return 2 * math.prod(evaluate(n, dims) for n in (sizes.rows, sizes.columns, sizes.depth)), size
    if CONVOLUTIONS.match(launch.op):
        return 2 * math.prod(dims[0][:3]) * math.prod(dims[1]), size
    if launch.op == "MultiscaleProjection":  # x (B, h, w, C), near (25, C), mix (C, D)
        return 2 * math.prod(dims[0][:3]) * (math.prod(dims[1]) + math.prod(dims[2])), size
    if launch.op == "NormedTaps":  # x (B, h, w, C), weight (C, 9 N)
        return 2 * math.prod(dims[0][:3]) * math.prod(dims[3]), size
    if launch.op == "CrossAttention":  # q (B, N, H D), keys (blocks, B, 1, H, L, D): scores and their sums of values
        return 4 * math.prod(dims[0]) * dims[1][-2], size
    if launch.op == "CausalAttention":  # out (B, S, H D): a token meets half of the keys, and half of the values
        return 2 * math.prod(evaluate(n, dims) for n in launch.outputs[0].shape) * dims[0][1], size
    if launch.op == "ReluLinearAttention":  # k^T v, and q (B, H, N, D) with that
        return 4 * math.prod(dims[0]) * dims[0][-1], size
    if launch.op in OF_QKV:  # one of q, k and v meets D columns a head
        state = launch.outputs[0].shape if launch.op == "LinearAttentionState" else dims[1]
        return 2 * math.prod(dims[0]) // 3 * evaluate(state[-1], dims), size
    return 0, size


@contextmanager
def launches() -> Iterator[list[Launched]]:
    """Launches are appended while it is open. Not for several threads."""
    found: list[Launched] = []
    kinds: tuple[Any, ...] = (KernelWork, ProductWork)
    before = {kind: kind.queue for kind in kinds}

    def queue(work: KernelWork | ProductWork, *arguments: Any) -> None:
        before[type(work)](work, *arguments)
        kernel = work.kernel.entry if isinstance(work, KernelWork) else PRODUCT
        found.append(Launched(kernel, work.launch.op, *cost(work.launch, work.dims)))

    try:
        for kind in kinds:
            kind.queue = queue
        yield found
    finally:
        for kind, real in before.items():
            kind.queue = real


def attributed(seen: Sequence[tuple[str, float]], launched: Sequence[Launched], runs: int) -> list[Kernel]:
    """Of a run, the kernels of one name, op and work together. seen: name and milliseconds of each of `runs` runs, in their order.

    Where the numbers of a name's kernels and launches differ, its FLOPs and bytes are not known.
    """
    by_name: dict[str, list[Launched]] = defaultdict(list)
    for each in launched:
        by_name[each.kernel].append(each)
    places: dict[str, list[int]] = defaultdict(list)
    for place, (name, _) in enumerate(seen):
        known = name if name in by_name else PRODUCT if PRODUCTS.search(name) else None
        if known is not None:
            places[known].append(place)
    owner = {
        place: launch
        for name, found in by_name.items()
        if len(found) == len(places[name])
        for place, launch in zip(places[name], found, strict=True)
    }
    times: dict[tuple[str, Launched | None], list[float]] = defaultdict(list)
    for place, (name, ms) in enumerate(seen):
        times[name, owner.get(place)].append(ms)
    return [
        Kernel(
            name=name[:300],
            kind=launch.op if launch else "",
            ms=sum(found) / runs,
            flops=launch.flops * len(found) / runs if launch else 0,
            bytes=launch.bytes * len(found) / runs if launch else 0,
        )
        for (name, launch), found in times.items()
    ]
