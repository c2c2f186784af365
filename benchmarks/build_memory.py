"""Time and memory of building a bundle of Sana-1.6B for four GPU architectures, with random weights, on this machine.

    python benchmarks/build_memory.py --work /tmp/build --record

The build runs in a child process with an empty cache. Memory is the child's high-water mark as the kernel counts it, files mapped
into it included. Needs about 45 GB of disk in --work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from benchmarks.figures import ROOT, record
from benchmarks.random_checkpoint import write_random_checkpoint
from sana_ref.variants import VARIANTS

VARIANT, TARGETS = "sana_1600m_1024px", "sm80,sm86,sm89,sm120"


def run(command: list[str], cwd: Path) -> tuple[int, float, float]:
    """Exit code, seconds, and peak resident GB of a child process."""
    begin = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ | {"PYTHONPATH": str(cwd)})
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoint, cache and bundle; kept")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    options = parser.parse_args()
    model, cache, out = (options.work / name for name in ("checkpoint", "cache", "bundle"))
    if not (model / "text_encoder" / "config.json").is_file():
        write_random_checkpoint(VARIANTS[VARIANT], model)
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "export.build_engine", "--model", str(model), "--precision", "fp16"]
    command += ["--target", TARGETS, "--out", str(out), "--cache", str(cache)]
    code, seconds, peak_gb = run(command, ROOT)
    if code:
        print(f"the build failed with exit code {code}; nothing is recorded")
        return code
    print(f"{seconds:.0f} s, peak {peak_gb:.2f} GB")
    if options.record:
        note = f"Sana-1.6B, random weights, {TARGETS}, one engine a component, parity check included, empty cache"
        record("build_1600m_fp16_s", seconds, "s", note=note)
        record("build_1600m_fp16_peak_gb", peak_gb, "GB", note=f"{note}; resident, mapped files included")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
