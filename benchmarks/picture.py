"""Seconds from prompt to PNG on this machine's CPU, and from a fresh clone to a picture.

python benchmarks/picture.py --bundle out/sana-tiny --record     median of 5 pictures after one for warm-up, engine open
python benchmarks/picture.py --fresh-clone --record              `make demo` in a new clone, with its own empty cache
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.figures import ROOT, record
from runtime import SanaEngine
from runtime.image import save_png

PROMPT, PICTURES = "an owl on a purple background", 5


def picture_s(bundle: Path) -> float:
    times = []
    with tempfile.TemporaryDirectory() as folder, SanaEngine(bundle, backend="onnxruntime", progress=False) as engine:
        for _ in range(PICTURES + 1):
            began = time.perf_counter()
            save_png(engine.generate(PROMPT, seed=5)[0], Path(folder) / "picture.png")
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def fresh_clone_s() -> float:
    """Raises CalledProcessError if the demo fails, RuntimeError if it leaves no picture."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        environment["SANA_CACHE_DIR"] = str(Path(folder) / "cache")
        began = time.perf_counter()
        subprocess.run(["make", "demo"], cwd=clone, env=environment, check=True)
        seconds = time.perf_counter() - began
        if not (clone / "out" / "picture.png").is_file():
            raise RuntimeError("make demo ended well and left no out/picture.png")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", type=Path, help="of sana-tiny")
    what.add_argument("--fresh-clone", action="store_true")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    options = parser.parse_args()
    if options.fresh_clone:
        name, seconds = "demo_fresh_clone_s", fresh_clone_s()
    else:
        name, seconds = "tiny_picture_cpu_s", picture_s(options.bundle)
    print(f"{name}: {seconds:.2f}")
    if options.record:
        record(name, seconds, "s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
