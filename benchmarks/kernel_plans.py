"""Times launch plans of the Triton kernels on the GPU that is here, beside the plan in the source.

    python benchmarks/kernel_plans.py --out benchmarks/results/kernel_plans_h200.json

For each kernel, at sizes of Sana-1.6B and 0.6B and of DC-AE's decoder: milliseconds in a CUDA graph of every plan that fits, the
best ones and the source's printed. All plans are compiled first, by a process for each core (--jobs). The constants at the top of
each file in plugins/ come from such a run; change them where another plan is better at most sizes. Beside the convolution stands
cuDNN's, of PyTorch's choice. --out is written after each kernel; a call that finds there what was measured of this commit, without
changes, on this machine goes on behind it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from benchmarks.figures import CHANGES, UNKNOWN, commit, machine, versions, write_result
from benchmarks.graph_timing import graph_ms
from benchmarks.writable import writable_file
from engines.spec import nearest
from plugins import (
    conv3x3,
    conv3x3_quantized,
    cross_attention,
    fp8_quantize,
    gated_depthwise_conv,
    modulated_norm,
    qkv_linear_attention,
    qkv_linear_attention_kernels,
)
from plugins.rows import head_and_tail, num_warps
from runtime.together import default_threads

SHARED = 227 * 1024  # bytes a block may have on compute capability 9.0
CALLS = 6  # in a graph
BEST = 4  # plans that are printed
Call = Callable[[], object]
Plan = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A kernel at a size. launch: a call for a plan. peer: another's program for the same, by name."""

    name: str
    plans: list[Plan]
    launch: Callable[[Plan], Call]
    source: Plan
    peers: Mapping[str, Call] = field(default_factory=dict)


def grid_of(**choices: tuple[Any, ...]) -> list[Plan]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def half(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def gated_convolution() -> Iterator[Case]:
    module = gated_depthwise_conv
    sizes = ((2, 32, 5600), (2, 64, 5600), (2, 128, 5600), (2, 32, 2880))
    for (batch, side, inner), quantized in itertools.product(sizes, (False, True)):
        x, weight, bias = half(batch, side, side, 2 * inner), half(3, 3, 2 * inner), half(2 * inner)
        y, scales, scale = half(batch, side, side, inner), None, None
        if quantized:
            scales, scale = torch.empty(batch, side, side, device="cuda"), 0.1
            y = torch.empty(y.shape, device="cuda", dtype=torch.int8)

        def launch(plan: Plan, given=(x, weight, bias, x, y, scales), scale=scale, side=side, inner=inner, batch=batch) -> Call:  # type: ignore[no-untyped-def]
            programs = (-(-inner // plan["C"]), -(-side // module.COLUMNS) * -(-side // plan["rows"]), batch)
            return lambda: module.gate_kernel[programs](
                *(*given, side, side, plan["rows"], scale, inner),
                C=plan["C"],
                BACKWARD=False,
                num_warps=plan["num_warps"],
                maxnreg=plan["maxnreg"],
            )

        block, least = module.sizes(inner, quantized)
        _, options = module.plan(batch=batch, height=side, width=side, channels=inner, block=block, least=least)
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
        most = torch.randn(2, heads, 64, head_dim + 1, head_dim, device="cuda")

        def state(plan: Plan, qkv=qkv, most=most, tokens=tokens, heads=heads) -> Call:  # type: ignore[no-untyped-def]
            parts = -(-tokens // plan["part"])
            options = fixed | {name: plan[name] for name in ("BLOCK_N", "num_warps", "num_stages")}
            return lambda: qkv_linear_attention_kernels.state_kernel[2 * heads, parts](
                qkv, None, most, heads, tokens, plan["part"], **options
            )

        def apply(plan: Plan, qkv=qkv, most=most, out=out, tokens=tokens, heads=heads) -> Call:  # type: ignore[no-untyped-def]
            options = fixed | {name: plan[name] for name in ("BLOCK_N", "num_warps", "num_stages")}
            numbers = (heads, tokens, plan["tile"], module.num_parts(tokens), module.EPS, None)
            return lambda: qkv_linear_attention_kernels.apply_kernel[2 * heads, -(-tokens // plan["tile"])](
                qkv, None, most, out, None, *numbers, **options
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
        chosen = module.plan(module.APPLY, "fp16", head_dim)
        yield Case(f"{module.APPLY} {size}", plans, apply, {"tile": module.tile(tokens), **chosen})


def text_attention() -> Iterator[Case]:
    module, keys_count = cross_attention, 300
    for tokens, heads, dim in ((1024, 20, 112), (4096, 20, 112), (16384, 20, 112), (1024, 16, 72)):
        q, out = half(2, tokens, heads * dim), half(2, tokens, heads * dim)
        keys, values = half(4, 2, 1, heads, keys_count, dim), half(4, 2, 1, heads, keys_count, dim)
        bias = torch.full((2, keys_count), -10000.0, device="cuda", dtype=torch.float16)
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
        bits, scale = torch.empty(2, tokens, dim, device="cuda", dtype=torch.int8), torch.empty(2, tokens, device="cuda")
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
        bits, scale = torch.empty(rows, dim, device="cuda", dtype=torch.int8), torch.empty(rows, device="cuda")

        def launch(plan: Plan, x=x, bits=bits, scale=scale, rows=rows, dim=dim) -> Call:  # type: ignore[no-untyped-def]
            return lambda: module.quantize_kernel[(rows,)](x, bits, scale, D=dim, **head_and_tail(dim), num_warps=plan["num_warps"])

        yield Case(
            f"{module.OP} {rows}x{dim} fp16",
            grid_of(num_warps=(1, 2, 4, 8)),
            launch,
            {"num_warps": num_warps(dim, module.CHANNELS)},
        )


def convolutions() -> Iterator[Case]:
    module, dtype = conv3x3, torch.bfloat16
    for side, channels, outputs in ((1024, 128, 128), (512, 256, 256), (256, 512, 512), (1024, 128, 3)):
        x, weight = half(1, side, side, channels, dtype=dtype), half(outputs, 3, 3, channels, dtype=dtype)
        bias, y = half(outputs, dtype=dtype), half(1, side, side, outputs, dtype=dtype)

        def launch(plan: Plan, given=(x, weight, bias, y), side=side, channels=channels, outputs=outputs) -> Call:  # type: ignore[no-untyped-def]
            programs = (-(-side * side // plan["BLOCK_M"]) * -(-outputs // plan["BLOCK_N"]), 1)
            constants = {"C": channels, "N": outputs, "ACTIVATION": "silu", "GROUP_M": module.GROUP_M}
            return lambda: module.conv_kernel[programs](*given, side, side, **constants, **plan)

        chosen = module.plan(module.OP, 90, "bf16", channels, outputs)
        source = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
        source |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
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
            (20 * torch.randn(*shape, device="cuda")).to(dtype) for shape in ((1, side, side, channels), (channels, 3, 3, channels))
        )
        residual = half(1, side, side, channels, dtype=torch.bfloat16)
        scales, vector = torch.full((channels,), 1e-5, device="cuda"), half(channels, dtype=torch.bfloat16)
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

        chosen = module.plan(op, 90, channels, channels)
        source = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
        source |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
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


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "gated_depthwise_conv": gated_convolution,
    "qkv_linear_attention": linear_attention,
    "cross_attention": text_attention,
    "modulated_norm": norms,
    "fp8_quantize": quantizing,
    "conv3x3": convolutions,
    "conv3x3_quantized": quantized_convolutions,
}


def milliseconds(call: Call) -> float:
    return round(graph_ms([call] * CALLS) / CALLS, 5)


def measured(case: Case) -> dict[str, Any]:
    plans = case.plans if case.source in case.plans else [*case.plans, case.source]
    rows = sorted(({"ms": milliseconds(case.launch(plan)), **plan} for plan in plans), key=lambda row: row["ms"])
    own = next(row for row in rows if {name: row[name] for name in case.source} == dict(case.source))
    return {
        "kernel": case.name,
        "source": own,
        "peers": {name: milliseconds(call) for name, call in case.peers.items()},
        "plans": rows,
    }


def compile_share(names: Iterable[str], share: int, shares: int) -> None:
    """Launch each of the plans of a share once: Triton keeps what it compiled, for all processes."""
    for case in (case for name in names for case in CASES[name]()):
        for plan in [*case.plans, case.source][share::shares]:
            case.launch(plan)()
    torch.cuda.synchronize()


def compile_all(names: str, jobs: int) -> None:
    """Raises CalledProcessError where a plan does not compile."""
    command = [sys.executable, __file__, "--kernels", names, "--compile-share"]
    running = [subprocess.Popen([*command, f"{share}/{jobs}"]) for share in range(jobs)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes), command)


def measure(names: Iterable[str], out: Path | None) -> None:
    """Cases of CASES, written to `out` one after the other, but for those that it has of the same commit. Changes that are not
    committed may be others by now: all is measured anew."""
    head = {"machine": machine(), "versions": versions(), "commit": commit()}
    before = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {}
    known = head["commit"] != UNKNOWN and CHANGES not in str(head["commit"])
    found = before.get("kernels", []) if known and {key: before.get(key) for key in head} == head else []
    done = {row["kernel"] for row in found}
    for case in (case for name in names for case in CASES[name]()):
        if case.name in done:
            continue
        found.append(measured(case))
        best = "; ".join(str(row) for row in found[-1]["plans"][:BEST])
        print(f"{case.name}: source {found[-1]['source']}; best {best}; {found[-1]['peers']}", flush=True)
        if out is not None:
            write_result(out, head | {"kernels": found})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(CASES), help="some of them, joined by commas")
    parser.add_argument("--out", type=writable_file, help="a JSON file to write")
    parser.add_argument(
        "--jobs", type=int, default=default_threads(), help="processes that compile, %(default)s here; 1: no others"
    )
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)  # what such a process is given: "3/16"
    options = parser.parse_args()
    names = options.kernels.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--kernels: got {', '.join(unknown)}; {nearest(unknown[0], CASES)}")
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}; expected 1 or more")
    if not torch.cuda.is_available():
        parser.error("got no GPU; expected one: plans are measured")
    if options.compile_share:
        compile_share(names, *map(int, options.compile_share.split("/")))
        return 0
    if options.jobs > 1:
        compile_all(options.kernels, options.jobs)
    torch.backends.cudnn.benchmark = True
    measure(names, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
