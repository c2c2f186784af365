"""Time and memory of building a bundle of Sana-1.6B for four GPU architectures, with random weights, on this machine.

    python benchmarks/build_memory.py --work /tmp/build --record

The build runs in a child process with an empty cache. Memory is the child's high-water mark as the kernel counts it, files mapped
into it included: the largest of its stages, each of which starts the mark anew. Needs about 45 GB of disk in --work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figures import ROOT, record
from benchmarks.random_checkpoint import write_random_checkpoint
from sana_ref.variants import VARIANTS

VARIANT, TARGETS = "sana_1600m_1024px", "sm80,sm86,sm89,sm120"


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
    report = options.work / "report.json"
    command += ["--target", TARGETS, "--out", str(out), "--cache", str(cache), "--report", str(report)]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        print(f"the build failed with exit code {done.returncode}; nothing is recorded")
        return done.returncode
    stages = json.loads(report.read_text(encoding="utf-8"))
    largest = max(stages, key=lambda stage: stage["peak_bytes"])
    peak_gb = largest["peak_bytes"] / 1e9
    print(f"{seconds:.0f} s, peak {peak_gb:.2f} GB in {largest['stage']}")
    if options.record:
        note = f"Sana-1.6B, random weights, {TARGETS}, one engine a component, parity check included, empty cache"
        record("build_1600m_fp16_s", seconds, "s", note=note)
        record(
            "build_1600m_fp16_peak_gb",
            peak_gb,
            "GB",
            note=f"{note}; resident, mapped files included; in the stage: {largest['stage']}",
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
