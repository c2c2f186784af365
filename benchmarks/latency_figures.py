"""The figures that latency.py --record appends: steps and decode as the runtime's loop runs them, and the peers of that run."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.figures import UNSUPPORTED, record
from benchmarks.latency_floor import PRODUCTS, floor_of
from benchmarks.latency_history import Record
from benchmarks.latency_work import PROMPT, Work, num_tokens
from benchmarks.latency_yardstick import copy_rate
from engines.gpu import device_info
from engines.spec import COMPONENTS, QUANTIZED, Precision
from runtime.image import save_png

if TYPE_CHECKING:
    from engines.parity_report import ErrorStats
    from runtime import SanaEngine
    from sana_ref.checkpoint import Checkpoint

__all__ = ["record_figures", "record_step_ratios"]


def picture_times(engine: SanaEngine, width: int, height: int, steps: int, pictures: int) -> dict[str, Any]:
    """Medians over `pictures` requests of one picture, after two for warm-up; and whether all had the same bytes."""
    rows: list[tuple[list[float], float, float]] = []
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures + 2):
            began = time.perf_counter()
            picture = engine.generate(PROMPT, seed=5, steps=steps, width=width, height=height)[0]
            save_png(picture, Path(folder) / "picture.png")
            wall = time.perf_counter() - began
            digests.add(hashlib.sha256(picture.tobytes()).hexdigest())
            timings = engine.last_timings[0]
            if number >= 2:
                rows.append((list(timings.steps_s), timings.decode_s, wall))
    return {
        "step_ms": 1000 * statistics.median(s for steps_s, _, _ in rows for s in steps_s),
        "decode_ms": 1000 * statistics.median(decode for _, decode, _ in rows),
        "gpu_ms": 1000 * statistics.median(sum(steps_s) + decode for steps_s, decode, _ in rows),
        "wall_ms": 1000 * statistics.median(wall for _, _, wall in rows),
        "same_bytes": len(digests) == 1,
    }


def size_name(checkpoint: Checkpoint) -> str:
    """ "1600m", or "tiny" below 100 million parameters."""
    count = sum(int(np.prod(shape)) for shape in checkpoint.sources["transformer"].shapes.values())
    return "tiny" if count < 100e6 else f"{round(count / 1e8) * 100}m"


def floor_beside(engine: SanaEngine, checkpoint: Checkpoint, found: Record) -> tuple[dict[str, float], str]:
    """As a peer, and in words: products, which took turns with the work, and traffic at the rate of a copy. Empty: they did not,
    for there is none."""
    if (products := found.references.get(PRODUCTS)) is None:
        return {}, ""
    work = Work(component=found.component, width=found.width, height=found.height, batch=found.batch)
    floor = floor_of(checkpoint, work, found.precision, tokens=num_tokens(engine, work))
    assert floor is not None  # its products were measured
    traffic_ms = 1000 * floor.traffic_bytes / copy_rate(gpu=True)
    return {"floor": round(products.ms + traffic_ms, 4)}, f"floor: products {products.ms:.2f} ms, traffic {traffic_ms:.2f}"


def record_figures(
    engine: SanaEngine,
    checkpoint: Checkpoint,
    records: Sequence[Record],
    errors: Mapping[str, Mapping[str, ErrorStats]],
    *,
    steps: int,
    pictures: int,
    note: str,
) -> bool:
    """Append figures of what was measured at the first size: a step and a decode at batch 1, two texts, pictures; with their peers.

    Steps and decode are timed as the runtime's loop runs them: all steps of several pictures. False, and nothing is appended, if
    the same request gave different pictures. Of a bundle that draws none, because it has not all components, they are what was
    measured by itself. errors: by component, as latency_parity.engine_errors has them.
    """
    from engines import tensorrt

    size, unsupported = size_name(checkpoint), _unsupported()
    versions = {"tensorrt": f"{tensorrt.flavor()} {tensorrt.version()}"}
    first = next((found for found in records if found.component != "text_encoder"), records[0])
    px = _px(first.width, first.height)

    def keep(name: str, value: float, *words: str, peer: dict[str, float] | None = None) -> None:
        record(name, value, "ms", peer=peer, note="; ".join(filter(None, (*words, note, unsupported))), extra_versions=versions)

    found = {each.component: each for each in records if (each.width, each.height, each.batch) == (first.width, first.height, 1)}
    if {"denoiser", "decoder"} & set(found):
        draws = set(engine.manifest.components) == set(COMPONENTS)
        if draws:
            times = picture_times(engine, first.width, first.height, steps, pictures)
        else:
            stages = {"denoiser": "step_ms", "decoder": "decode_ms"}
            times = {name: found[component].device.p50 for component, name in stages.items() if component in found}
        if draws and not times["same_bytes"]:
            print("the same request gave different pictures; nothing is recorded")
            return False
        print(json.dumps(times, indent=1))
        names = {"denoiser": f"step_{size}_{px}", "decoder": f"decode_{px}" if size != "tiny" else f"decode_tiny_{px}"}
        for component, stage in (("denoiser", "step"), ("decoder", "decode")):
            if component not in found:
                continue
            ratio = errors[component]["engine"].rms / errors[component]["pytorch"].rms
            floor, words = floor_beside(engine, checkpoint, found[component])
            keep(
                f"{names[component]}_{found[component].precision}_ms",
                times[f"{stage}_ms"],
                f"rms error {ratio:.2f} x PyTorch's",
                words,
                _clock(found[component]),
                "" if draws else "by itself, in one CUDA graph",
                peer=_peers(found[component]) | floor,
            )
        if size == "tiny" and draws:
            keep("tiny_picture_gpu_ms", times["wall_ms"], f"{steps} steps, {px}, prompt to PNG")
    if "picture" in found:
        picture = found["picture"]
        sprint = "sprint_" if checkpoint.transformer_config.guidance_embeds else "picture_"
        name = f"{sprint}{size}_{px}_{picture.steps}step_" + ("" if sprint == "sprint_" else f"{picture.precision}_")
        words = f"prompt to PNG; GPU {picture.device.p50:.1f} ms, p90 {picture.device.p90:.1f}; in all {picture.wall.p50:.1f} ms"
        if sprint == "sprint_":  # without peers, whose times are the wall clock's
            keep(f"{name}gpu_ms", picture.device.p50, words, _clock(picture))
        whole, peers = f"{name}wall_ms" if sprint == "sprint_" else f"{name}ms", _peers(picture)
        of_peers = (f"{peer}: {said}" for peer in peers if (said := picture.references[peer].note))
        keep(whole, picture.wall.p50, words, _clock(picture), *of_peers, peer=peers)
    for text in records:
        if (text.component, text.batch) == ("text_encoder", 2) and size != "tiny":
            name = f"encode_text_{text.precision}_ms" if text.width else f"encode_text_instructed_{text.precision}_ms"
            floor, least = floor_beside(engine, checkpoint, text)
            words = f"{text.width} tokens" if text.width else "with the instruction"
            keep(name, text.device.p50, words, f"p90 {text.device.p90:.2f} ms", least, _clock(text), peer=_peers(text) | floor)
    return True


def _px(width: int, height: int) -> str:
    return f"{width}px" if width == height else f"{width}x{height}px"


def record_step_ratios(checkpoint: Checkpoint, records: Sequence[Record], *, note: str) -> None:
    """Append step_ratio_FORMAT, of Sana-1.6B at 1024 px, or step_ratio_SIZE_PX_FORMAT, with the parts that are others: of each
    quantised denoiser among the records of a run its time by that of the fp16 one of the same model and size, each by itself in one
    CUDA graph.

    Of one picture, at the first size that both were measured at.
    """
    size = size_name(checkpoint)
    steps = [each for each in records if (each.component, each.batch) == ("denoiser", 1)]
    plain = {_same(each): each for each in reversed(steps) if each.precision == Precision.FP16}
    done = set()
    for each in steps:
        beside = plain.get(_same(each))
        if each.precision not in QUANTIZED or beside is None or (each.model, each.precision) in done:
            continue
        done.add((each.model, each.precision))
        times = f"{each.device.p50:.2f} ms of {beside.device.p50:.2f}"
        if each.clock_mhz and beside.clock_mhz:  # a GPU at its limit of power is faster with work that takes less of it
            times += f", GPU at {each.clock_mhz:.0f} MHz and {beside.clock_mhz:.0f}"
        px = _px(each.width, each.height)
        parts = ("step_ratio", "" if size == "1600m" else size, "" if px == "1024px" else px, str(each.precision))
        words = (f"{each.model}, {each.width} x {each.height} px, batch 1", times, note, _unsupported())
        record(
            "_".join(filter(None, parts)),
            each.device.p50 / beside.device.p50,
            "ratio",
            note="; ".join(filter(None, words)),
            extra_versions={name: each.versions[name] for name in ("tensorrt",) if name in each.versions},
        )


def _same(found: Record) -> tuple[object, ...]:
    return found.run, found.model, found.backend, found.width, found.height, found.machine


def _unsupported() -> str:
    return UNSUPPORTED if device_info().capability == (9, 0) else ""


def _clock(found: Record) -> str:
    return f"GPU at {found.clock_mhz:.0f} MHz" if found.clock_mhz else ""


def _peers(found: Record) -> dict[str, float]:
    return {name: round(other.ms, 4) for name, other in found.references.items() if other.rms_error is not None}
