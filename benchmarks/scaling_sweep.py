"""How the cost of attention grows with the size of a picture: Sana's linear attention beside softmax attention of the same width.

    python benchmarks/scaling_sweep.py                                 # 512 px to 8192 px; on a CPU at sana-tiny's width
    python benchmarks/scaling_sweep.py --heads 20 --sides 512,1024,2048

A latent cell is 32 x 32 px and one token, so 8192 px are 65,536 tokens. Timed are sana::relu_linear_attention, PyTorch's
scaled_dot_product_attention of as many heads and channels, and a whole Sana transformer of one block. The exponent is the slope of
log time over log pixels: 1 where twice the pixels take twice as long, 2 where they take four times as long. Small sizes, where the
launch is most of the time, are left out of it; where the data no longer fit a CPU's caches, each pixel costs more. Memory that was
freed is kept there: from the kernel anew, it takes longer than linear attention. What would take longer than --limit-s is not run,
and said to be so. The sweep is written to benchmarks/history/scaling_sweep.json, from where latency.py --report takes it.
"""

from __future__ import annotations

import argparse
import ctypes
import html
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field

from benchmarks import figures
from benchmarks.latency_history import HISTORY
from benchmarks.latency_timing import Task, TorchEvents, cpu_clock
from benchmarks.plots import Axis, Series, chart
from benchmarks.training_step import TEXT_TOKENS, ours
from benchmarks.writable import check_writable
from engines.errors import NoGpuError, SanaError, SpecError
from engines.spec import PX_PER_LATENT
from engines.strict import read_bounded, validate_json
from sana_ref import ops
from sana_ref.transformer import SanaTransformerConfig

SIDES = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # px
HEAD_DIM = 32
NAMES = {"linear": "linear attention", "quadratic": "softmax attention", "block": "a Sana transformer of one block"}
FILE = HISTORY / "scaling_sweep.json"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Sweep(BaseModel):
    """ms: by NAMES, one for each side; None where it was not run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    sides: tuple[int, ...]  # px
    heads: int
    head_dim: int
    dtype: str
    ms: dict[str, tuple[Positive | None, ...]]
    machine: str
    versions: dict[str, str]
    command: str
    commit: str
    date: str

    def exponent(self, name: str) -> float | None:
        """Of the larger half of the sizes that were run; None if they are fewer than two."""
        points = [(side * side, ms) for side, ms in zip(self.sides, self.ms[name], strict=True) if ms is not None]
        points = points[-max(2, -(-len(points) // 2)) :]
        if len(points) < 2:
            return None
        pixels, times = zip(*points, strict=True)
        return float(np.polyfit(np.log(pixels), np.log(times), 1)[0])


def tasks(side: int, heads: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed at one size, by name. The memory is taken when a task first runs."""
    tokens, width = (side // PX_PER_LATENT) ** 2, heads * HEAD_DIM

    def qkv() -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        return [torch.randn(1, heads, tokens, HEAD_DIM, generator=generator, device=device).to(dtype) for _ in range(3)]

    def linear() -> Callable[[], object]:
        q, k, v = qkv()
        return lambda: ops.relu_linear_attention(q, k, v)

    def quadratic() -> Callable[[], object]:
        q, k, v = qkv()
        return lambda: F.scaled_dot_product_attention(q, k, v)

    def block() -> Callable[[], object]:
        config = replace(
            SanaTransformerConfig(),
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            num_layers=1,
            num_cross_attention_heads=max(1, heads // 4),
            cross_attention_head_dim=width // max(1, heads // 4),
            cross_attention_dim=width,
            caption_channels=width,
        )
        model = ours(config, torch.device(device)).to(dtype).requires_grad_(False).eval()
        cells = side // PX_PER_LATENT
        latents = torch.zeros(1, config.in_channels, cells, cells, device=device, dtype=dtype)
        text, mask = torch.zeros(1, TEXT_TOKENS, width, device=device, dtype=dtype), torch.ones(1, TEXT_TOKENS, device=device)
        timestep = torch.full((1,), 500.0, device=device)
        return lambda: model(latents, text, timestep, mask)

    return {"linear": _lazily(linear), "quadratic": _lazily(quadratic), "block": _lazily(block)}


def _lazily(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    made: list[Callable[[], object]] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what is allocated next. Where it is not glibc's, nothing changes.

    By default glibc asks the kernel anew for every tensor over 32 MB, which is one of 8 heads from 5600 px: a page fault for every
    4 KiB, and linear attention seemed to grow with the power of 1.6 of the pixels.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@torch.inference_mode()
def sweep(sides: Sequence[int], *, heads: int, device: str, repeats: int = 5, limit_s: float = 20.0) -> Sweep:
    """Medians of `repeats` samples after one for warm-up; of what takes over 2 s, one. A sample that the last size lets expect to
    take over limit_s is not taken.

    Raises SpecError for sides that are no multiples of 32 px, or that do not grow; and for a number that is not above 0.
    """
    for name, number in (("--heads", heads), ("--repeats", repeats), ("--limit-s", limit_s)):
        if not number > 0:
            raise SpecError(f"{name}: got {number}; expected a number above 0.")
    if list(sides) != sorted(set(sides)) or any(side % PX_PER_LATENT or side < PX_PER_LATENT for side in sides):
        raise SpecError(f"--sides: got {', '.join(map(str, sides))}; expected growing multiples of {PX_PER_LATENT} px.")
    dtype = torch.float16 if device == "cuda" else torch.float32
    watch = TorchEvents() if device == "cuda" else cpu_clock
    ms: dict[str, list[float | None]] = {name: [] for name in NAMES}
    for side in sides:
        for name, call in tasks(side, heads, device, dtype).items():
            before = [(old, found) for old, found in zip(sides, ms[name], strict=False) if found is not None]
            if len(before) < len(ms[name]) or _expected_ms(name, side, before) > 1000 * limit_s:
                ms[name].append(None)
                continue
            task = Task(name, call, watch)
            count = repeats if task.sample().wall_ms < 2000 else 1
            ms[name].append(statistics.median(task.sample().ms for _ in range(count)))
        print(f"{side} px: " + ", ".join(f"{NAMES[name]} {_words(found[-1])}" for name, found in ms.items()), flush=True)
    return Sweep(
        sides=tuple(sides),
        heads=heads,
        head_dim=HEAD_DIM,
        dtype=str(dtype).removeprefix("torch."),
        ms={name: tuple(found) for name, found in ms.items()},
        machine=figures.machine() if device == "cuda" else figures.machine().rpartition(", ")[2],
        versions=figures.versions(),
        command=figures.command(),
        commit=figures.commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _expected_ms(name: str, side: int, before: Sequence[tuple[int, float]]) -> float:
    if not before:
        return 0.0
    old, ms = before[-1]
    return ms * (side / old) ** (4 if name == "quadratic" else 2)


def _words(ms: float | None) -> str:
    return "not run: too long" if ms is None else f"{ms:.3f} ms"


def section(found: Sweep) -> str:
    """For a page, as HTML."""
    series, words = [], []
    for name, title in NAMES.items():
        points = [(side * side / 1e6, ms) for side, ms in zip(found.sides, found.ms[name], strict=True) if ms is not None]
        if not points:
            continue
        exponent = found.exponent(name)
        series.append(Series(name=title, points=points))
        words.append(f"{title}: not known" if exponent is None else f"{title}: pixels to the power of {exponent:.2f}")
        if name != "block" and len(points) > 1:  # what exactly linear or quadratic growth from the last point would be
            power = 2 if name == "quadratic" else 1
            (first, _), (last, ms) = points[0], points[-1]
            slope = [(first, ms * (first / last) ** power), (last, ms)]
            series.append(Series(name=f"power of {power}", points=slope, dots=False, dashed=True))
    ticks = [(side * side / 1e6, str(side)) for side in found.sides if math.log2(side).is_integer()]
    drawing = chart("Time by size", Axis(label="px", log=True, ticks=ticks or None), Axis(label="ms", log=True), series)
    about = f"{found.heads} heads of {found.head_dim} channels, {found.dtype}, {found.machine}, {found.date[:10]}, {found.commit}"
    return (
        f"<h2>Growth with the size of a picture</h2><p>{html.escape('; '.join(words))}. {html.escape(about)}.</p>"
        f"<div class=charts>{drawing}</div>"
    )


def read(path: Path = FILE) -> Sweep | None:
    """The last sweep; None if there is none. Raises ManifestError for a file that is none."""
    return validate_json(Sweep, read_bounded(path), source=str(path)) if path.is_file() else None


def write(found: Sweep, path: Path = FILE) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 if it could not be measured or written; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(map(str, SIDES)), help=f"px (default: {','.join(map(str, SIDES))})")
    parser.add_argument("--heads", type=int, help="of 32 channels (default: 70, Sana-1.6B's; on a CPU 8, sana-tiny's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=20.0, help="what would take longer is not run")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    heads = (70 if options.device == "cuda" else 8) if options.heads is None else options.heads
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise NoGpuError("--device: got cuda, but PyTorch sees no GPU; expected cpu.")
        check_writable("--out", options.out)
        if options.device == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        found = sweep(_numbers(options.sides), heads=heads, device=options.device, repeats=options.repeats, limit_s=options.limit_s)
        for name, title in NAMES.items():
            exponent = found.exponent(name)
            print(f"{title}: " + ("not known" if exponent is None else f"pixels to the power of {exponent:.2f}"))
        write(found, options.out)
    except (SanaError, OSError) as error:
        print(f"scaling_sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scaling_sweep: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _numbers(text: str) -> list[int]:
    if not all(word.isdecimal() for word in text.split(",")):
        raise SpecError(f"--sides: got {text!r}; expected px, such as {SIDES[0]},{SIDES[1]}.")
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
