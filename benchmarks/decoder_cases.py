"""Plans of the kernels of DC-AE's decoder, at its sizes for 1024 px. benchmarks/kernel_plans.py times them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import triton

from benchmarks.kernel_case import DEVICE, SHARED, Call, Case, Plan, grid_of, half
from plugins import conv3x3, conv3x3_kernels, conv3x3_quantized, conv3x3_upsample, conv_taps, multiscale_projection, static_quantize

__all__ = ["CASES"]


def blocks_of(chosen: conv3x3.Plan) -> Plan:
    blocks = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
    return blocks | {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def convolutions() -> Iterator[Case]:
    module, dtype = conv3x3, torch.bfloat16
    for side, channels, outputs in ((1024, 128, 128), (512, 256, 256), (256, 512, 512), (1024, 128, 3)):
        x, weight = half(1, side, side, channels, dtype=dtype), half(outputs, 3, 3, channels, dtype=dtype)
        bias, y = half(outputs, dtype=dtype), half(1, side, side, outputs, dtype=dtype)

        def launch(plan: Plan, given=(x, weight, bias, y), side=side, channels=channels, outputs=outputs) -> Call:  # type: ignore[no-untyped-def]
            programs = (-(-side * side // plan["BLOCK_M"]) * -(-outputs // plan["BLOCK_N"]), 1)
            constants = {"C": channels, "N": outputs, "ACTIVATION": "silu", "GROUP_M": module.GROUP_M}
            return lambda: conv3x3_kernels.conv_kernel[programs](*given, side, side, **constants, **plan)

        source = blocks_of(module.plan(module.OP, 90, "bf16", channels, outputs))
        widest = max(16, triton.next_power_of_2(outputs))
        plans = [
            plan
            for plan in grid_of(BLOCK_M=(128, 256), BLOCK_N=(16, 128, 256), BLOCK_K=(64,), num_warps=(4, 8), num_stages=(3, 4))
            if plan["BLOCK_N"] <= widest
            and (plan["BLOCK_N"] == 16) == (widest == 16)
            and plan["BLOCK_M"] * plan["BLOCK_N"] <= 128 * 256
            and 2 * (plan["BLOCK_M"] + plan["BLOCK_N"]) * plan["BLOCK_K"] * plan["num_stages"] <= SHARED
        ]
        first, filters = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
        peer = {
            "cudnn": lambda first=first, filters=filters, bias=bias: torch.nn.functional.conv2d(first, filters, bias, padding=1)
        }
        yield Case(f"{module.OP} {side}x{side}x{channels} to {outputs} bf16", plans, launch, source, peer)


def quantized_convolutions() -> Iterator[Case]:
    module = conv3x3_quantized
    sizes = {conv3x3.OP: ((1024, 128), (512, 256), (256, 512)), conv3x3.NORM: ((1024, 128), (512, 256))}
    for op, side, channels in ((op, *size) for op, (_, form) in module.OPS.items() for size in sizes[form]):
        kind, form = module.OPS[op]
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        x, weight = (
            (20 * torch.randn(*shape, device=DEVICE)).to(dtype) for shape in ((1, side, side, channels), (channels, 3, 3, channels))
        )
        residual = half(1, side, side, channels, dtype=torch.bfloat16)
        scales, vector = torch.full((channels,), 1e-5, device=DEVICE), half(channels, dtype=torch.bfloat16)
        y, bits = torch.empty_like(residual), torch.empty_like(residual, dtype=torch.int8)

        def launch(plan: Plan, op=op, given=(x, weight, scales, vector, residual, y, bits), side=side, channels=channels) -> Call:  # type: ignore[no-untyped-def]
            x, weight, scales, vector, residual, y, bits = given
            blocks = -(-channels // plan["BLOCK_N"])
            programs = (-(-side * side // plan["BLOCK_M"]) * blocks, 1)
            sizes = {"KIND": module.OPS[op][0], "C": channels, "N": channels}
            if module.OPS[op][1] == conv3x3.NORM:
                inputs = (x, weight, scales, residual, vector, vector, y, bits, side, side, 1e-5, 0.1)
                return lambda: module.norm_kernel[programs](*inputs, **sizes, **plan)
            options = {"ACTIVATION": "silu", "GROUP_M": conv3x3.GROUP_M}
            return lambda: module.conv_kernel[programs](
                x, weight, scales, vector, bits, side, side, 0.1, **sizes, **options, **plan
            )

        source = blocks_of(module.plan(op, 90, channels, channels))
        plans = [
            plan
            for plan in grid_of(BLOCK_M=(128, 256), BLOCK_N=(128, 256), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(3, 4))
            if plan["BLOCK_N"] <= channels
            and (form == conv3x3.OP or plan["BLOCK_N"] == channels)
            and 128 * 128 <= plan["BLOCK_M"] * plan["BLOCK_N"] <= 128 * 256
            and (plan["num_warps"] == 8 or plan["BLOCK_M"] * plan["BLOCK_N"] == 128 * 128)
            and (plan["BLOCK_M"] + plan["BLOCK_N"]) * plan["BLOCK_K"] * plan["num_stages"] <= SHARED
        ]
        yield Case(f"{op} {side}x{side}x{channels}", plans, launch, source)


def normed_convolutions() -> Iterator[Case]:
    module = conv3x3
    for side, channels in ((1024, 128), (512, 256)):
        x, residual, y = (half(1, side, side, channels, dtype=torch.bfloat16) for _ in range(3))
        weight, vector = half(channels, 3, 3, channels, dtype=torch.bfloat16), half(channels, dtype=torch.bfloat16)

        def launch(plan: Plan, given=(x, weight, residual, vector, vector, y), side=side, channels=channels) -> Call:  # type: ignore[no-untyped-def]
            programs = (-(-side * side // plan["BLOCK_M"]), 1)
            return lambda: conv3x3_kernels.norm_kernel[programs](*given, side, side, module.EPS, C=channels, N=channels, **plan)

        source = blocks_of(module.plan(module.NORM, 90, "bf16", channels, channels))
        plans = [
            plan
            for plan in grid_of(BLOCK_M=(64, 128, 256), BLOCK_N=(channels,), BLOCK_K=(64,), num_warps=(4, 8), num_stages=(2, 3, 4))
            if plan["BLOCK_M"] * channels <= 128 * 256
            and 2 * (plan["BLOCK_M"] + channels) * plan["BLOCK_K"] * plan["num_stages"] <= SHARED
        ]
        yield Case(f"{module.NORM} {side}x{side}x{channels} bf16", plans, launch, source)


def upsampling() -> Iterator[Case]:
    module = conv3x3_upsample
    for side, channels, outputs in ((32, 1024, 1024), (64, 1024, 512), (128, 512, 512), (256, 512, 256), (512, 256, 128)):
        x, y = half(1, side, side, channels, dtype=torch.bfloat16), half(1, 2 * side, 2 * side, outputs, dtype=torch.bfloat16)
        weight, bias = half(4 * outputs, 3, 3, channels, dtype=torch.bfloat16), half(4 * outputs, dtype=torch.bfloat16)
        repeats = 4 * outputs // channels

        def launch(plan: Plan, given=(x, weight, bias, y), side=side, sizes=(channels, outputs, repeats)) -> Call:  # type: ignore[no-untyped-def]
            channels, outputs, repeats = sizes
            programs = (-(-side * side // plan["BLOCK_M"]) * -(-4 * outputs // plan["BLOCK_N"]), 1)
            constants = {"C": channels, "N": outputs, "REPEATS": repeats, "NEAREST": True, "GROUP_M": conv3x3.GROUP_M}
            return lambda: module.kernel[programs](*given, side, side, **constants, **plan)

        source = blocks_of(module.plan(90, "bf16", channels, outputs, repeats, True))
        plans = [
            plan
            for plan in grid_of(BLOCK_M=(64, 128, 256), BLOCK_N=(64, 128, 256), BLOCK_K=(64,), num_warps=(4, 8), num_stages=(3, 4))
            if outputs % plan["BLOCK_N"] == 0
            and 64 * 128 <= plan["BLOCK_M"] * plan["BLOCK_N"] <= 128 * 256
            and 2 * (plan["BLOCK_M"] + plan["BLOCK_N"]) * plan["BLOCK_K"] * plan["num_stages"] <= SHARED
        ]
        yield Case(f"{module.OP} {side}x{side}x{channels} to {outputs} bf16", plans, launch, source)


def ends() -> Iterator[Case]:
    module, side, channels, outputs = conv_taps, 1024, 128, 3
    columns, dtype = 9 * outputs, torch.bfloat16
    x, vector, weight = (
        half(1, side, side, channels, dtype=dtype),
        half(channels, dtype=dtype),
        half(channels, columns, dtype=dtype),
    )
    taps, y = half(1, columns, side, side, dtype=torch.float32), half(1, side, side, outputs, dtype=dtype)

    def launch(plan: Plan) -> Call:
        constants = {"C": channels, "PADDED": channels, "COLUMNS": columns, "PADDED_COLUMNS": 32, **plan}
        programs = (-(-side * side // plan["BLOCK_M"]), 1)
        return lambda: module.taps_kernel[programs](x, vector, vector, weight, taps, side * side, conv3x3.EPS, **constants)

    def summed(plan: Plan) -> Call:
        programs = (-(-side * side // plan["BLOCK"]), 1)
        return lambda: module.sum_kernel[programs](taps, vector, y, side, side, N=outputs, **plan)

    plans = grid_of(BLOCK_M=(32, 64, 128), num_warps=(4, 8))
    source = {"BLOCK_M": module.BLOCK_M, "num_warps": module.NUM_WARPS}
    yield Case(f"{module.OP} {side}x{side}x{channels} bf16", plans, launch, source)
    source = {"BLOCK": module.SUM_BLOCK, "num_warps": module.SUM_WARPS}
    yield Case(f"{module.SUM} {side}x{side} bf16", grid_of(BLOCK=(256, 512, 1024), num_warps=(2, 4, 8)), summed, source)


def second_scales() -> Iterator[Case]:
    module, head_dim = multiscale_projection, 32
    for side, channels in ((32, 3072), (64, 3072), (128, 1536)):
        x, out = (half(1, side, side, width, dtype=torch.bfloat16) for width in (channels, 2 * channels))
        near, mix = half(25, channels, dtype=torch.bfloat16), half(channels, head_dim, dtype=torch.bfloat16)

        def launch(plan: Plan, given=(x, near, mix, out), side=side, channels=channels) -> Call:  # type: ignore[no-untyped-def]
            strips = -(-side // module.COLUMNS) * -(-side // plan["rows"])
            programs = (-(-channels // plan["E"]), strips, 1)
            return lambda: module.kernel[programs](
                *given, side, side, channels, plan["rows"], D=head_dim, E=plan["E"], num_warps=plan["num_warps"]
            )

        source = {"rows": module.strip_rows(side), "E": module.BLOCK_C, "num_warps": module.NUM_WARPS}
        plans = grid_of(rows=(4, 8, 16, 32), E=(64, 128, 256), num_warps=(1, 2, 4))
        yield Case(f"{module.OP} {side}x{side}x{channels} bf16", plans, launch, source)


def static_quantizing() -> Iterator[Case]:
    module = static_quantize
    for side, channels in ((1024, 128), (256, 512)):
        x = half(side * side, channels, dtype=torch.bfloat16)
        bits = torch.empty(x.shape, device=DEVICE, dtype=torch.int8)

        def launch(plan: Plan, x=x, bits=bits, channels=channels) -> Call:  # type: ignore[no-untyped-def]
            programs = (-(-x.numel() // plan["BLOCK"]),)
            return lambda: module.quantize_kernel[programs](x, bits, len(x), 0.1, KIND="fp8", D=channels, **plan)

        plans = grid_of(BLOCK=(1024, 2048, 4096), num_warps=(1, 2, 4, 8))
        source = {"BLOCK": module.BLOCK, "num_warps": module.NUM_WARPS}
        yield Case(f"{module.OP['fp8']} {side}x{side}x{channels} bf16", plans, launch, source)


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "conv3x3": convolutions,
    "conv3x3_norm": normed_convolutions,
    "conv3x3_upsample": upsampling,
    "conv3x3_quantized": quantized_convolutions,
    "conv_taps": ends,
    "multiscale_projection": second_scales,
    "static_quantize": static_quantizing,
}
