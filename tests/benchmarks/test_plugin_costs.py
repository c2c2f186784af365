"""FLOPs and bytes of plugins' launches, and which kernel is whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.latency_history import Kernel
from benchmarks.plugin_costs import PRODUCT, Launched, attributed, cost, launches
from plugins import (
    causal_attention,
    conv3x3,
    conv_taps,
    cross_attention,
    gated_depthwise_conv,
    linear,
    modulated_norm,
    multiscale_projection,
    qkv_linear_attention,
    relu_linear_attention,
)
from plugins.launch import Launch
from plugins.work import KernelWork, ProductWork

TARGET = ["sm90"]
B, N, H, D, L, C = 2, 64, 2, 32, 30, 128
STATE, APPLY = qkv_linear_attention.STATE, qkv_linear_attention.APPLY
CASES = {  # attributes, shapes of inputs, FLOPs, numbers of 16 bits and of 32 that are read and written
    "product": (
        lambda: linear.attributes("fp16", 3, 3 * C, C, bias=True),
        [(B, N, C), (3 * C, C), (3 * C,)],
        2 * B * N * C * 3 * C,
        B * N * C + 3 * C * C + 3 * C + B * N * 3 * C,
        0,
    ),
    "convolution": (
        lambda: conv3x3.compile_cubins(conv3x3.OP, TARGET, "bf16", C, C, activation="silu"),
        [(B, 8, 8, C), (C, 3, 3, C), (C,)],
        2 * 9 * B * 64 * C * C,
        2 * B * 64 * C + 9 * C * C + C,
        0,
    ),
    "depthwise": (
        lambda: gated_depthwise_conv.compile_cubins(TARGET, "fp16", 2 * C),
        [(B, 8, 8, 2 * C), (3, 3, 2 * C), (2 * C,)],
        2 * 9 * B * 64 * 2 * C,
        3 * B * 64 * C + 9 * 2 * C + 2 * C,
        0,
    ),
    "text": (  # of 5 blocks' keys and values, one block's are read
        lambda: cross_attention.compile_cubins(TARGET, "fp16", heads=H, n_keys=L, head_dim=D, block=3),
        [(B, N, H * D), (5, B, 1, H, L, D), (5, B, 1, H, L, D), (B, L)],
        4 * B * N * L * H * D,
        2 * B * N * H * D + 2 * B * H * L * D + B * L,
        0,
    ),
    "turned": (  # q and k of qkv are read
        lambda: causal_attention.compile_cubins(causal_attention.ROTATE, TARGET, "bf16", 2 * H, H, D),
        [(B, N, 4 * H * D), (N, D // 2), (N, D // 2)],
        0,
        2 * B * N * 3 * H * D,
        N * D,
    ),
    "causal": (  # v of qkv is read
        lambda: causal_attention.compile_cubins(causal_attention.ATTEND, TARGET, "bf16", 2 * H, H, D),
        [(B, N, 3 * H * D), (B, N, 4 * H * D), (B, N)],
        2 * B * N * N * 2 * H * D,
        B * N * 3 * H * D + B * N * H * D + B * N + B * N * 2 * H * D,
        0,
    ),
    "state": (  # k and v of qkv are read
        lambda: qkv_linear_attention.compile_cubins(STATE, TARGET, "fp16", H, D),
        [(B, N, 3 * H * D)],
        2 * B * N * H * D * D,
        2 * B * N * H * D,
        B * H * D * (D + 1),
    ),
    "apply": (  # q of qkv is read
        lambda: qkv_linear_attention.compile_cubins(APPLY, TARGET, "fp16", H, D),
        [(B, N, 3 * H * D), (B, H, 1, D + 1, D)],
        2 * B * N * H * D * D,
        2 * B * N * H * D,
        B * H * D * (D + 1),
    ),
    "attention in one kernel": (
        lambda: relu_linear_attention.compile_cubins(TARGET, "fp16", D),
        [(B, H, N, D)] * 3,
        4 * B * N * H * D * D,
        4 * B * N * H * D,
        0,
    ),
    "scales": (
        lambda: multiscale_projection.compile_cubins(TARGET, "bf16", C, D),
        [(B, 8, 8, C), (25, C), (C, D)],
        2 * B * 64 * C * (25 + D),
        3 * B * 64 * C + 25 * C + C * D,
        0,
    ),
    "taps": (
        lambda: conv_taps.compile_cubins(conv_taps.OP, TARGET, "bf16", C, 3),
        [(B, 8, 8, C), (C,), (C,), (C, 27)],
        2 * B * 64 * C * 27,
        B * 64 * C + 2 * C + C * 27,
        B * 64 * 27,
    ),
    "sum of taps": (
        lambda: conv_taps.compile_cubins(conv_taps.SUM, TARGET, "bf16", 1, 3),
        [(B, 27, 8, 8), (3,)],
        0,
        3 + B * 64 * 3,
        B * 64 * 27,
    ),
    "norm": (
        lambda: modulated_norm.compile_cubins(TARGET, "fp16", modulated_norm.Variant(dim=C, rows=(0, 1), time_rows=2), 1e-6),
        [(B, N, C), (B, N, C), (B, 2 * C), (2, C)],
        0,
        4 * B * N * C + 2 * B * C + 2 * C,
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cost(name: str) -> None:
    attributes, dims, flops, halves, wide = CASES[name]
    launch = Launch.from_json(attributes()["launch"])
    assert cost(launch, dims) == (flops, 2 * halves + 4 * wide)


def test_launches_are_noted_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Any] = []
    monkeypatch.setattr(KernelWork, "queue", lambda work, *arguments: queued.append(arguments))
    monkeypatch.setattr(ProductWork, "queue", lambda work, *arguments: queued.append(arguments))
    works: list[Any] = [object.__new__(KernelWork), object.__new__(ProductWork)]
    for work, name in zip(works, ("norm", "product"), strict=True):
        attributes, work.dims, *_ = CASES[name]
        work.launch = Launch.from_json(attributes()["launch"])
        work.kernel = SimpleNamespace(entry="norm_kernel")
    with launches() as found:
        for work in works:
            work.queue([1], [2], 3, 4)
    works[0].queue([1], [2], 3, 4)
    assert queued == 3 * [([1], [2], 3, 4)]
    assert [(each.kernel, each.op) for each in found] == [("norm_kernel", "ModulatedNorm"), (PRODUCT, "Linear")]
    assert (found[1].flops, found[1].bytes) == cost(works[1].launch, works[1].dims)


def test_kernels_have_the_work_of_their_launches() -> None:
    """Two runs of a norm, two products of other sizes by one kernel, another product, and what TensorRT runs between them."""
    run = [
        Launched("norm_kernel", "ModulatedNorm", 0, 100),
        Launched(PRODUCT, "Linear", 1000, 10),
        Launched(PRODUCT, "Linear", 3000, 30),
        Launched(PRODUCT, "Fp8Linear", 500, 5),
    ]
    seen = [
        ("norm_kernel", 1.0),
        ("nvjet_a", 2.0),
        ("__myl_Add", 0.5),
        ("Memset (Device)", 0.1),
        ("nvjet_a", 3.0),
        ("nvjet_b", 1.5),
    ]
    found = attributed(2 * seen, 2 * run, runs=2)
    assert sorted(found, key=lambda each: (each.name, each.flops)) == [
        Kernel(name="Memset (Device)", kind="", ms=0.1, flops=0, bytes=0),
        Kernel(name="__myl_Add", kind="", ms=0.5, flops=0, bytes=0),
        Kernel(name="norm_kernel", kind="ModulatedNorm", ms=1.0, flops=0, bytes=100),
        Kernel(name="nvjet_a", kind="Linear", ms=2.0, flops=1000, bytes=10),
        Kernel(name="nvjet_a", kind="Linear", ms=3.0, flops=3000, bytes=30),
        Kernel(name="nvjet_b", kind="Fp8Linear", ms=1.5, flops=500, bytes=5),
    ]


def test_other_numbers_of_kernels_than_of_launches_are_not_attributed() -> None:
    """As where cuBLASLt takes two kernels for a product. Those of other names still are."""
    run = [Launched("norm_kernel", "ModulatedNorm", 0, 100), Launched(PRODUCT, "Linear", 1000, 10)]
    seen = [("norm_kernel", 1.0), ("gemm", 2.0), ("gemm_reduce", 0.5)]
    assert {each.name: (each.kind, each.flops, each.bytes) for each in attributed(seen, run, runs=1)} == {
        "norm_kernel": ("ModulatedNorm", 0, 100),
        "gemm": ("", 0, 0),
        "gemm_reduce": ("", 0, 0),
    }


def test_nothing_is_known_of_launches_in_cpp() -> None:
    (found,) = attributed([("nvjet_a", 2.0)], [], runs=1)
    assert (found.kind, found.flops) == ("", 0)
