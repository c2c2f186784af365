"""The C++ program beside the Python runtime: start, time per picture and peak memory, of the same bundle in the same run.

    python benchmarks/embedding.py out/sana-tiny --program out/cpp/sana --record

Both run as programs, in turn, `rounds` times: once for one picture and once for more. Medians.

- cpp_picture_s: of a further picture: the two runs' difference, divided by the pictures more.
- cpp_start_s: of a run of one picture, what is beyond that: the process, opening and verifying, loading, and what a first picture
  costs more than a second.
- cpp_peak_mb: most memory that was resident in the run of one picture, mapped files included.

The Python runtime's are the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import record
from engines.errors import RequestError, SanaError

PROMPT = "an owl above a pizza on a purple background"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process."""

    seconds: float
    peak_mb: float  # MB are 1e6 bytes


@dataclass(frozen=True, kw_only=True)
class Medians:
    start_s: float
    picture_s: float
    peak_mb: float


# A process begins with the peak of the one that started it: a small one stands between.
MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, seconds, peak, done.stderr.decode(errors="replace")[-8000:]]))
"""


def run(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Raises SanaError if it fails."""
    measure = [sys.executable, "-I", "-S", "-c", MEASURE]
    done = subprocess.run([*measure, *command], capture_output=True, text=True, env=environment, check=True)
    code, seconds, peak_kib, said = json.loads(done.stdout)
    if code:
        raise SanaError(f"{command[0]}: ended with {code}. It said: {said}")
    return Run(seconds=seconds, peak_mb=peak_kib * 1024 / 1e6)


def compare(bundle: Path, program: Path, *, rounds: int, more: int, options: Sequence[str]) -> dict[str, Medians]:
    """ "cpp" and "python". more: pictures beyond the first, in every second run. options: of `sana generate`, for both."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    programs = {"cpp": [str(program)], "python": [sys.executable, "-m", "apps.cli"]}
    one: dict[str, list[Run]] = {name: [] for name in programs}
    many: dict[str, list[Run]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(rounds + 1):
            for name, command in programs.items():
                generate = [*command, "generate", str(bundle), PROMPT, *options, "--out", out]
                one[name].append(run(generate, environment))
                many[name].append(run([*generate, "--count", str(1 + more)], environment))
    found = {}
    for name in programs:
        del one[name][0], many[name][0]  # files come into the page cache
        picture_s = statistics.median((b.seconds - a.seconds) / more for a, b in zip(one[name], many[name], strict=True))
        start_s = statistics.median(each.seconds for each in one[name]) - picture_s
        found[name] = Medians(start_s=start_s, picture_s=picture_s, peak_mb=statistics.median(each.peak_mb for each in one[name]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--program", type=Path, required=True, help="the C++ program sana")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--more", type=int, default=2, help="pictures beyond the first")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--note", default="")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    try:
        if options.rounds < 1 or options.more < 1:
            raise RequestError(f"--rounds, --more: got {options.rounds} and {options.more}; expected 1 or more of each.")
        given = ["--backend", options.backend, "--steps", str(options.steps)]
        found = compare(options.bundle, options.program, rounds=options.rounds, more=options.more, options=given)
    except SanaError as error:
        print(error, file=sys.stderr)
        return 2
    note = "; ".join(filter(None, (f"{options.bundle.name}, {options.steps} steps, {options.backend}", options.note)))
    for figure, unit in (("start_s", "s"), ("picture_s", "s"), ("peak_mb", "MB")):
        ours, theirs = getattr(found["cpp"], figure), getattr(found["python"], figure)
        print(f"cpp_{figure}: {ours:.4g} {unit}; Python {theirs:.4g} {unit}, {ours / theirs:.3f} of it", flush=True)
        if options.record:
            record(f"cpp_{figure}", ours, unit, peer={"python": theirs}, note=note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
