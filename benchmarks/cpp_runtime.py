"""The C++ runtime beside Python's on a GPU: start, time per picture and peak host memory, of the same bundle in the same run.

    python benchmarks/cpp_runtime.py out/sana-tiny --program out/cpp/sana --name tiny --record

Each is a program of its own, and both run in turn, `rounds` times. Both share one folder of compiled kernels, which a first run of
Python, that counts nowhere, fills. Medians:

- cpp_<name>_start_s: from opening the bundle, which verifies it, to the first picture. The note has what reading the engines alone
  takes: their files' bytes from the page cache.
- cpp_<name>_picture_ms: of a picture of a size and text that were drawn twice before, so that it is one CUDA graph.
- cpp_<name>_peak_mb: most host memory that was resident in the process, mapped files included. The note has what was resident when
  the bundle was opened: the program, the libraries of CUDA and TensorRT with what the linker wrote into them, and CUDA's context,
  but no engine and no picture. No program that draws with these has less.

Beside them, also in the note: when each part of the C++ program's start was over, and what was resident in each process, of its own
and of mapped files. The Python runtime's are the peers. The pixels of both must be the same, picture by picture; else nothing is
recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.embedding import MEASURE, PROMPT
from benchmarks.figures import UNSUPPORTED, record
from engines import tensorrt
from engines.bundle import Bundle
from engines.errors import ParityError, RequestError, SanaError
from engines.gpu import device_info
from plugins import cublas_lt, native
from runtime.image import read_picture

# What `sana generate --timings` does and says, with the Python runtime.
PYTHON = """
import sys, time
from pathlib import Path
from runtime import SanaEngine
from runtime.image import save_png
bundle, kernels, out, prompt, count, steps, side = sys.argv[1:]
began = time.perf_counter()
def tell(what):
    print(f"sana: {what} after {time.perf_counter() - began:.6f} s", file=sys.stderr)
def tell_memory(when):
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    mb = {words[0]: int(words[1]) * 1024 / 1e6 for words in lines}
    text = f"{mb['RssAnon:']:.1f} MB of its own, {mb['RssFile:']:.1f} MB of mapped files; the most until now {mb['VmHWM:']:.1f} MB"
    print(f"sana: memory, {when}: {text}", file=sys.stderr)
with SanaEngine(bundle, backend="tensorrt", progress=False, kernel_cache=Path(kernels)) as engine:
    tell("opened")
    tell_memory("opened")
    for seed in range(int(count)):
        tell("asked")
        (picture,) = engine.generate(prompt, seed=seed, steps=int(steps), width=int(side), height=int(side))
        tell("drawn")
        if seed == 0:
            tell_memory("first picture")
        print(save_png(picture, Path(out) / f"{seed}.png"))
    tell_memory("end")
"""
WHEN = ("opened", "first picture", "end")


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Host memory of a process. MB are 1e6 bytes."""

    own_mb: float  # anonymous: heaps, stacks, and pages of libraries that the linker wrote to
    files_mb: float  # of mapped files: libraries, mostly

    @property
    def total_mb(self) -> float:
        return self.own_mb + self.files_mb


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process."""

    open_s: float
    start_s: float
    picture_s: float
    peak_mb: float  # MB are 1e6 bytes
    parts: dict[str, float]  # of the start: seconds until each was over, in order
    resident: dict[str, Resident]  # by WHEN
    pictures: tuple[bytes, ...]


def run(command: Sequence[str], out: Path, count: int) -> Run:
    """Raises SanaError if it fails, or says something else than `--timings`."""
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {"SANA_CUBLASLT": ":".join(cublas_lt.paths())} | os.environ | {"PYTHONPATH": paths}
    if command[0] != sys.executable and environment.get(native.VARIABLE) == native.PYTHON:
        del environment[native.VARIABLE]  # C++ has the shell beside it
    # A process begins with the peak of the one that started it: a small one stands between.
    measure = [sys.executable, "-I", "-S", "-c", MEASURE]
    done = subprocess.run([*measure, *command], capture_output=True, text=True, env=environment, check=True)
    code, _, peak_kib, said = json.loads(done.stdout)
    if code:
        raise SanaError(f"{command[0]}: ended with {code}. It said: {said}")
    parts = [(what, float(seconds)) for what, seconds in re.findall(r"sana: (.+) after (\S+) s\n", said)]
    times = [(what, seconds) for what, seconds in parts if what in ("opened", "asked", "drawn")]
    if [what for what, _ in times] != ["opened", *["asked", "drawn"] * count]:
        raise SanaError(f"{command[0]}: got the times {times}; expected those of opening and of {count} pictures. It said: {said}")
    found_memory = re.findall(r"sana: memory, (.+): (\S+) MB of its own, (\S+) MB of mapped files", said)
    resident = {when: Resident(own_mb=float(own), files_mb=float(files)) for when, own, files in found_memory}
    if tuple(resident) != WHEN:
        raise SanaError(f"{command[0]}: got its memory at {tuple(resident)}; expected {WHEN}. It said: {said}")
    drawn = [b - a for (_, a), (_, b) in pairwise(times[1:])][::2]
    found = sorted(out.glob("*.png"), key=lambda path: int(path.stem.rsplit("-", 1)[-1]))
    return Run(
        open_s=times[0][1],
        start_s=times[2][1],
        picture_s=statistics.median(drawn[2:]),
        peak_mb=peak_kib * 1024 / 1e6,
        parts=dict(reversed(parts)),  # of each name the first
        resident=resident,
        pictures=tuple(read_picture(path)[0].tobytes() for path in found),
    )


def compare(bundle: Path, program: Path, *, rounds: int, count: int, steps: int, side: int) -> dict[str, list[Run]]:
    """ "cpp" and "python". Raises ParityError if their pixels differ."""
    found: dict[str, list[Run]] = {"cpp": [], "python": []}
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        for number in range(rounds + 1):
            for name in ("python", "cpp"):  # the first one of Python leaves the kernels
                out = Path(folder) / f"{name}-{number}"
                out.mkdir()
                if name == "python":
                    command = [sys.executable, "-c", PYTHON, str(bundle), str(kernels), str(out), PROMPT, str(count), str(steps)]
                    command.append(str(side))
                else:
                    command = [str(program), "generate", str(bundle), PROMPT, "--count", str(count), "--backend", "tensorrt"]
                    command += ["--timings", "--steps", str(steps), "--width", str(side), "--height", str(side)]
                    command += ["--kernel-cache", str(kernels), "--out", str(out)]
                found[name].append(run(command, out, count))
    pictures = {each.pictures for runs in found.values() for each in runs}
    if len(pictures) != 1:
        raise ParityError(
            f"{bundle}: got {len(pictures)} different sets of pictures from {rounds + 1} runs each of C++ and Python; expected one."
        )
    return {name: runs[1:] for name, runs in found.items()}


def read_engines(bundle: Path) -> float:
    """Seconds to read the bytes of the engines, which are in the page cache."""
    opened, sm = Bundle.open(bundle, verify=False), device_info().sm
    began = time.perf_counter()
    for component in opened.manifest.components:
        with open(opened.require_engine(component, sm), "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--program", type=Path, required=True, help="the C++ program sana")
    parser.add_argument("--name", default="tiny", help="of the model, in the figures' names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=8, help="pictures of a process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=512, help="px")
    parser.add_argument("--note", default="")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    try:
        if options.rounds < 1 or options.count < 3:
            raise RequestError(f"--rounds, --count: got {options.rounds} and {options.count}; expected at least 1 and 3.")
        found = compare(
            options.bundle, options.program, rounds=options.rounds, count=options.count, steps=options.steps, side=options.side
        )
        read_s, device = read_engines(options.bundle), device_info()
    except SanaError as error:
        print(error, file=sys.stderr)
        return 2
    parts = [
        f"{what} after {statistics.median(each.parts.get(what, math.nan) for each in found['cpp']):.3f} s"
        for what in sorted(found["cpp"][0].parts, key=found["cpp"][0].parts.__getitem__)
    ]
    memory = []
    for name, runs in found.items():
        for when in WHEN:
            own, files = (statistics.median(getattr(each.resident[when], part) for each in runs) for part in ("own_mb", "files_mb"))
            memory.append(f"{name}, {when}: {own:.0f} MB of its own and {files:.0f} MB of mapped files resident")
    print("\n".join((*(f"C++: {part}" for part in parts), *memory)))
    held = {name: statistics.median(each.resident["opened"].total_mb for each in runs) for name, runs in found.items()}
    opened = {name: statistics.median(each.open_s for each in runs) for name, runs in found.items()}
    note = f"{options.steps} steps, {options.side}px; the same pixels; reading the engines alone {read_s:.3f} s; "
    note += (
        f"opened and verified after {opened['cpp']:.3f} s, in Python {opened['python']:.3f} s; then, with the libraries and CUDA's "
    )
    note += f"context but no engine, {held['cpp']:.0f} MB were resident, in Python {held['python']:.0f} MB"
    unsupported = UNSUPPORTED if device.capability == (9, 0) else ""
    note = "; ".join(filter(None, (note, f"C++'s start: {', '.join(parts)}", *memory, options.note, unsupported)))
    rows = (
        ("start_s", "start_s", "s", 1),
        ("picture_ms", "picture_s", "ms", 1000),
        ("peak_mb", "peak_mb", "MB", 1),
    )
    for figure, field, unit, factor in rows:
        ours, theirs = (factor * statistics.median(getattr(each, field) for each in found[name]) for name in ("cpp", "python"))
        print(f"cpp_{options.name}_{figure}: {ours:.4g} {unit}; Python {theirs:.4g} {unit}, {ours / theirs:.3f} of it", flush=True)
        if options.record:
            more = {"tensorrt": f"{tensorrt.flavor()} {tensorrt.version()}"}
            record(f"cpp_{options.name}_{figure}", ours, unit, peer={"python": theirs}, note=note, extra_versions=more)
    print(note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
