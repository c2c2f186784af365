"""The record of measured numbers: one JSON line each in benchmarks/results/figures.jsonl, appended by the program that measured it.

Fields: figure, value, unit, peer (the same quantity of other programs, measured in the same run), note, machine, versions, command,
commit, date. Documents take their numbers from here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines.errors import NoGpuError
from engines.gpu import device_info

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "figures.jsonl"
# Said beside every figure of a combination that NVIDIA does not support.
UNSUPPORTED = "TensorRT for RTX on compute capability 9.0: works, but is not a combination that NVIDIA supports"
PACKAGES = ("torch", "triton", "diffusers", "onnx", "onnxruntime", "tensorrt-rtx-cu13", "transformers")
UNKNOWN, CHANGES = "unknown", "+changes"  # in place of a commit; behind one


def machine() -> str:
    """The GPU if there is one, and the processor."""
    try:
        gpu = f"{device_info().name}, "
    except NoGpuError:
        gpu = ""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return f"{gpu}{os.cpu_count()} x {cpu}"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a program's result as JSON. A file of before stays whole until the new one is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, marked if files differ from it, other than those that benchmarks append to.

    SANA_COMMIT, if set, for a copy outside of its repository; "unknown" where git does not say.
    """
    if said := os.environ.get("SANA_COMMIT"):
        return said
    if not (ROOT / ".git").exists():
        return UNKNOWN
    appended = (":!benchmarks/results", ":!benchmarks/history")
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *appended)
    except (OSError, subprocess.CalledProcessError):  # not installed; or a folder of somebody else's
        return UNKNOWN
    return head + (CHANGES if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def command() -> str:
    """What was typed, without the machine's folders."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return shlex.join(["python", str(name), *(word.removeprefix(f"{ROOT}{os.sep}") for word in sys.argv[1:])])


def record(
    figure: str,
    value: float,
    unit: str,
    *,
    peer: Mapping[str, float] | None = None,
    note: str = "",
    extra_versions: Mapping[str, str] | None = None,
    path: Path = FIGURES,
) -> dict[str, Any]:
    """Append one figure and return its line. note: what a reader must know beside the number (an unsupported combination, say)."""
    line: dict[str, Any] = {
        "figure": figure,
        "value": round(value, 6),
        "unit": unit,
        "peer": dict(peer or {}),
        "note": note,
        "machine": machine(),
        "versions": versions() | dict(extra_versions or {}),
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as sink:
        sink.write(json.dumps(line) + "\n")
    return line
