"""Times launch plans of the Triton kernels on the GPU that is here, beside the plan in the source.

    python benchmarks/kernel_plans.py --out benchmarks/results/kernel_plans_h200.json
    python benchmarks/kernel_plans.py --kernels causal_attention,rotate_heads --out benchmarks/results/kernel_plans_text_h200.json
    python benchmarks/kernel_plans.py --kernels conv_taps --out benchmarks/results/kernel_plans_end_h200.json

For each kernel, at sizes of Sana-1.6B and 0.6B, of DC-AE's decoder and of Gemma-2-2B: milliseconds in a CUDA graph of every plan
that fits, the best ones and the source's printed. All plans are compiled first, by a process for each core (--jobs). The constants
at the top of each file in plugins/ come from such a run; change them where another plan is better at most sizes.
tests/benchmarks/test_tuning_tables.py holds them to these tables, and says which are slower there and why. Beside the convolution
stands cuDNN's, of PyTorch's choice. --out is written after each kernel; a call that finds there what was measured of this commit,
without changes, on this machine goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoder_cases, denoiser_cases, text_cases
from benchmarks.figures import CHANGES, UNKNOWN, commit, machine, versions, write_result
from benchmarks.graph_timing import graph_ms
from benchmarks.kernel_case import Call, Case
from benchmarks.writable import writable_file
from engines.errors import RequestError
from engines.spec import nearest
from runtime.together import default_threads

CALLS = 6  # in a graph
BEST = 4  # plans that are printed
CASES: Mapping[str, Callable[[], Iterator[Case]]] = {**denoiser_cases.CASES, **decoder_cases.CASES, **text_cases.CASES}


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


def begun(names: Sequence[str], out: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a result says of this run, and what `out` has of the same commit, which is not measured again. Changes that are not
    committed may be others by now: all is measured anew. Raises RequestError if kernels of `out` that are none of `names` would be
    lost so."""
    head = {"machine": machine(), "versions": versions(), "commit": commit()}
    before = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {}
    known = head["commit"] != UNKNOWN and CHANGES not in str(head["commit"])
    if known and {key: before.get(key) for key in head} == head:
        return head, before.get("kernels", [])
    if before and (left := [name for name in CASES if name not in names]):
        raise RequestError(
            f"--out: got {out}, which is of commit {before.get('commit')}; expected a new file, or --kernels with "
            f"{', '.join(left)} too: what it has of them would be lost."
        )
    return head, []


def measure(names: Sequence[str], out: Path | None) -> None:
    """Cases of CASES, written to `out` one after the other. Raises as begun()."""
    head, found = begun(names, out)
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
    try:
        begun(names, options.out)
    except RequestError as error:
        parser.error(str(error))
    if options.jobs > 1:
        compile_all(options.kernels, options.jobs)
    torch.backends.cudnn.benchmark = True
    measure(names, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
