"""Plans of the denoiser's kernels, at sizes of Sana-1.6B and 0.6B. benchmarks/kernel_plans.py times them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch

from benchmarks.kernel_case import DEVICE, Call, Case, Plan, grid_of, half, to_fp8
from plugins import (
    cross_attention,
    fp8_quantize,
    gated_depthwise_conv,
    gated_depthwise_conv_kernel,
    gated_sum,
    modulated_norm,
    qkv_linear_attention,
    qkv_linear_attention_kernels,
)
from plugins.rows import head_and_tail, num_warps

__all__ = ["CASES"]


def gated_convolution() -> Iterator[Case]:
    module = gated_depthwise_conv
    sizes = ((2, 32, 5600), (2, 64, 5600), (2, 128, 5600), (2, 32, 2880))
    for (batch, side, inner), quantized in itertools.product(sizes, (False, True)):
        x, weight, bias = half(batch, side, side, 2 * inner), half(3, 3, 2 * inner), half(2 * inner)
        scale = 0.1 if quantized else None
        y, scales = to_fp8(batch, side, side, inner) if quantized else (half(batch, side, side, inner), None)

        def launch(plan: Plan, given=(x, weight, bias, x, y, scales), scale=scale, side=side, inner=inner, batch=batch) -> Call:  # type: ignore[no-untyped-def]
            programs = (-(-inner // plan["C"]), -(-side // module.COLUMNS) * -(-side // plan["rows"]), batch)
            return lambda: gated_depthwise_conv_kernel.gate_kernel[programs](
                *(*given, side, side, plan["rows"], scale, inner),
                C=plan["C"],
                BACKWARD=False,
                num_warps=plan["num_warps"],
                maxnreg=plan["maxnreg"],
            )

        _, options = module.plan(batch=batch, height=side, width=side, channels=inner, least=module.least_rows(inner))
        source = {name: options[name] for name in ("rows", "C", "num_warps")} | {"maxnreg": module.MAX_REGISTERS}
        plans = [
            p
            for p in grid_of(rows=(8, 11, 16, 32), C=(64, 128, 256), num_warps=(1, 2, 4), maxnreg=(None, 112, 120))
            if p["C"] // (32 * p["num_warps"]) in (1, 2, 4)
        ]
        kind = " to fp8" if quantized else ""
        yield Case(f"gated_depthwise_conv {batch}x{side}x{side}x{inner} fp16{kind}", plans, launch, source)


def linear_attention() -> Iterator[Case]:
    module, head_dim = qkv_linear_attention, 32
    fixed = {"D": head_dim, "PADDED": head_dim, "INTERLEAVED": False, "PRECISION": module.precision("fp16", rotary=False)}
    for tokens, heads in ((1024, 70), (4096, 70), (16384, 70), (1024, 36)):
        qkv, out = half(2, tokens, 3 * heads * head_dim), half(2, tokens, heads * head_dim)
        most = torch.randn(2, heads, 64, head_dim + 1, head_dim, device=DEVICE)

        def state(plan: Plan, qkv=qkv, most=most, tokens=tokens, heads=heads) -> Call:  # type: ignore[no-untyped-def]
            parts = -(-tokens // plan["part"])
            options = fixed | {name: plan[name] for name in ("BLOCK_N", "num_warps", "num_stages")}
            return lambda: qkv_linear_attention_kernels.state_kernel[2 * heads, parts](
                qkv, None, most, heads, tokens, plan["part"], **options
            )

        def apply(plan: Plan, given=(qkv, None, most), outputs=(out, None), scale=None, tokens=tokens, heads=heads) -> Call:  # type: ignore[no-untyped-def]
            options = fixed | {name: plan[name] for name in ("BLOCK_N", "num_warps", "num_stages")}
            numbers = (heads, tokens, plan["tile"], module.num_parts(tokens), module.EPS, scale)
            return lambda: qkv_linear_attention_kernels.apply_kernel[2 * heads, -(-tokens // plan["tile"])](
                *given, *outputs, *numbers, **options
            )

        size = f"2x{tokens} tokens, {heads} heads fp16"
        plans = [
            plan
            for plan in grid_of(part=(64, 128, 256, 512, 1024), BLOCK_N=(32, 64, 128), num_warps=(1, 2), num_stages=(1, 3))
            if plan["BLOCK_N"] <= plan["part"] and tokens // plan["part"] <= 64
        ]
        chosen = module.plan(module.STATE, "fp16", head_dim)
        part = -(-tokens // (module.num_parts(tokens) * chosen["BLOCK_N"])) * chosen["BLOCK_N"]
        yield Case(f"{module.STATE} {size}", plans, state, {"part": part, **chosen})
        plans = [
            plan
            for plan in grid_of(tile=(64, 128, 256, 512), BLOCK_N=(32, 64, 128), num_warps=(1, 2, 4), num_stages=(1,))
            if plan["BLOCK_N"] <= plan["tile"]
        ]
        source = {"tile": module.tile(tokens), **module.plan(module.APPLY, "fp16", head_dim)}
        yield Case(f"{module.APPLY} {size}", plans, apply, source)
        to_bits = functools.partial(apply, outputs=to_fp8(*out.shape), scale=0.1)
        yield Case(f"{module.APPLY} {size} to fp8", plans, to_bits, source)


def text_attention() -> Iterator[Case]:
    module, keys_count = cross_attention, 300
    for tokens, heads, dim in ((1024, 20, 112), (4096, 20, 112), (16384, 20, 112), (1024, 16, 72)):
        q, out = half(2, tokens, heads * dim), half(2, tokens, heads * dim)
        keys, values = half(4, 2, 1, heads, keys_count, dim), half(4, 2, 1, heads, keys_count, dim)
        bias = torch.full((2, keys_count), -10000.0, device=DEVICE, dtype=torch.float16)
        bias[0, :1] = bias[1, :40] = 0  # an empty prompt, and one of forty tokens
        constants, chosen = module.plan(90, "fp16", keys_count, dim)

        def launch(plan: Plan, given=(q, keys, values, bias, out), tokens=tokens, heads=heads, constants=constants) -> Call:  # type: ignore[no-untyped-def]
            blocks = {name: plan[name] for name in ("BLOCK_M", "BLOCK_N")}
            options = {"num_warps": plan["num_warps"], "num_stages": plan["num_stages"]}
            return lambda: module.kernel[-(-tokens // plan["BLOCK_M"]), heads, 2](
                *given, None, tokens, keys_count, 3, None, **{**constants, **blocks}, **options
            )

        source = {"BLOCK_M": constants["BLOCK_M"], "BLOCK_N": constants["BLOCK_N"], **chosen}
        plans = grid_of(BLOCK_M=(64, 128), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(1, 2))
        yield Case(f"{module.OP} 2x{tokens} tokens, {heads} heads of {dim} fp16", plans, launch, source)


def norms() -> Iterator[Case]:
    module = modulated_norm
    for (tokens, dim), quantized in itertools.product(((1024, 2240), (4096, 2240), (1024, 1152)), (False, True)):
        x, branch, hidden, normed = (half(2, tokens, dim) for _ in range(4))
        time, table = half(2, 6 * dim), half(6, dim)
        kind: Literal["fp8"] | None = "fp8" if quantized else None
        variant = module.Variant(dim=dim, rows=(0, 1, 5), time_rows=6, gate_time_rows=6, quantized=kind)
        bits, scale = to_fp8(2, tokens, dim)
        outputs = (hidden, bits, scale) if quantized else (hidden, normed)

        def launch(plan: Plan, given=(x, branch, time, table), outputs=outputs, variant=variant) -> Call:  # type: ignore[no-untyped-def]
            inputs, written = (*given, *given[2:]), (*outputs, None)[:3]  # the gate's time and table are the same
            rows, tokens = 2 * given[0].shape[1], given[0].shape[1]
            return lambda: module.norm_kernel[(rows,)](*inputs, *written, tokens, 1e-6, None, **variant.constants, **plan)

        name = f"{module.GATED} 2x{tokens}x{dim} fp16{' to fp8' if quantized else ''}"
        plans = grid_of(num_warps=(1, 2, 4), maxnreg=(None, 128, 112, 96))
        yield Case(name, plans, launch, {"num_warps": variant.num_warps, "maxnreg": None})


def quantizing() -> Iterator[Case]:
    module = fp8_quantize
    for rows, dim in ((2048, 2240), (2048, 5600), (8192, 5600)):
        x = half(rows, dim)
        bits, scale = to_fp8(rows, dim)

        def launch(plan: Plan, x=x, bits=bits, scale=scale, rows=rows, dim=dim) -> Call:  # type: ignore[no-untyped-def]
            return lambda: module.quantize_kernel[(rows,)](x, bits, scale, D=dim, **head_and_tail(dim), num_warps=plan["num_warps"])

        yield Case(
            f"{module.OP} {rows}x{dim} fp16",
            grid_of(num_warps=(1, 2, 4, 8)),
            launch,
            {"num_warps": num_warps(dim, module.CHANNELS)},
        )


def sums() -> Iterator[Case]:
    module = gated_sum
    for tokens, dim in ((1024, 2240), (4096, 2240), (1024, 1152)):
        tensors = (
            half(2, tokens, dim),
            half(2, tokens, dim),
            half(2, 6 * dim),
            half(6, dim),
            half(2, tokens, dim),
            *to_fp8(2, tokens, dim),
        )
        constants = {"ROW": 5, "ROWS": 6, "D": dim, **head_and_tail(dim)}

        def launch(plan: Plan, tensors=tensors, tokens=tokens, constants=constants) -> Call:  # type: ignore[no-untyped-def]
            return lambda: module.sum_kernel[(2 * tokens,)](*tensors, tokens, **constants, **plan)

        plans = grid_of(num_warps=(1, 2, 4), maxnreg=(None, 128, 96))
        source = {"num_warps": num_warps(dim, module.CHANNELS), "maxnreg": None}
        yield Case(f"{module.OP} 2x{tokens}x{dim} fp16", plans, launch, source)


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "gated_depthwise_conv": gated_convolution,
    "qkv_linear_attention": linear_attention,
    "cross_attention": text_attention,
    "modulated_norm": norms,
    "gated_sum": sums,
    "fp8_quantize": quantizing,
}
