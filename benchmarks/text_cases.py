"""Cases of benchmarks/kernel_plans.py: kernels of the text encoder, at two texts of Gemma-2-2B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.kernel_case import DEVICE, SHARED, Call, Case, Plan, grid_of, half
from plugins import causal_attention, causal_attention_kernels, normed_sum
from plugins.rows import head_and_tail, num_warps

__all__ = ["CASES"]

HEADS, KV_HEADS, DIM, CHANNELS = 8, 4, 256, 2304
LENGTHS = (300, 500)  # tokens of a prompt, and of one with its instruction


def attention() -> Iterator[Case]:
    module = causal_attention
    for tokens in LENGTHS:
        turned = half(2, tokens, (HEADS + KV_HEADS) * DIM, dtype=torch.bfloat16)
        qkv = half(2, tokens, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16)
        live = torch.ones(2, tokens, device=DEVICE, dtype=torch.bfloat16)
        out = half(2, tokens, HEADS * DIM, dtype=torch.bfloat16)

        def launch(plan: Plan, tensors=(turned, qkv, live, out), tokens=tokens) -> Call:  # type: ignore[no-untyped-def]
            rows = tokens * HEADS // KV_HEADS
            grid = (-(-rows // plan["BLOCK_M"]), KV_HEADS, 2)
            constants = {"H": HEADS, "K": KV_HEADS, "D": DIM, "PADDED": DIM, **plan}
            return lambda: causal_attention_kernels.attention_kernel[grid](*tensors, tokens, 4096, DIM**-0.5, 50.0, **constants)

        plans = [
            plan
            for plan in grid_of(BLOCK_M=(64, 128), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))
            if 2 * DIM * (plan["BLOCK_M"] + 2 * plan["num_stages"] * plan["BLOCK_N"]) <= SHARED
        ]
        chosen = module.blocks(90, DIM)
        source = {"BLOCK_M": chosen.m, "BLOCK_N": chosen.n, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        yield Case(f"{module.ATTEND} 2x{tokens} bf16", plans, launch, source)


def rotation() -> Iterator[Case]:
    module = causal_attention
    for tokens in LENGTHS:
        qkv = half(2, tokens, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16)
        cos, sin = (torch.randn(tokens, DIM // 2, device=DEVICE) for _ in range(2))
        turned = half(2, tokens, (HEADS + KV_HEADS) * DIM, dtype=torch.bfloat16)

        def launch(plan: Plan, tensors=(qkv, cos, sin, turned), tokens=tokens) -> Call:  # type: ignore[no-untyped-def]
            heads = HEADS + KV_HEADS
            grid = (-(-tokens * heads // plan["ROWS"]), 2)
            constants = {"HEADS": heads, "WIDTH": (heads + KV_HEADS) * DIM, "HALF": DIM // 2, "PADDED": DIM // 2, **plan}
            return lambda: causal_attention_kernels.rotate_kernel[grid](*tensors, tokens, **constants)

        plans = grid_of(ROWS=(4, 8, 16, 32), num_warps=(1, 2, 4, 8))
        yield Case(
            f"{module.ROTATE} 2x{tokens} bf16", plans, launch, {"ROWS": module.ROTATE_ROWS, "num_warps": module.ROTATE_WARPS}
        )


def norms() -> Iterator[Case]:
    row = {"D": CHANNELS, **head_and_tail(CHANNELS)}
    source = {"num_warps": num_warps(CHANNELS, normed_sum.CHANNELS)}
    for tokens in LENGTHS:
        x, branch, hidden, normed = (half(2, tokens, CHANNELS, dtype=torch.bfloat16) for _ in range(4))
        weights = [half(CHANNELS, dtype=torch.bfloat16) for _ in range(2)]
        tensors = (x, branch, *weights, hidden, normed)

        def launch(plan: Plan, tensors=tensors, tokens=tokens) -> Call:  # type: ignore[no-untyped-def]
            return lambda: normed_sum.kernel[(2 * tokens,)](*tensors, 1e-6, **row, **plan)

        yield Case(f"{normed_sum.OP} 2x{tokens} bf16", grid_of(num_warps=(1, 2, 4, 8, 16)), launch, source)


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {"causal_attention": attention, "rotate_heads": rotation, "normed_sum": norms}
