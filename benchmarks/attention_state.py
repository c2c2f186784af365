"""Why linear attention's state and normaliser stay in fp32: what quantizing them costs, beside quantizing what makes them.

    python -m benchmarks.attention_state --model models/sana-tiny --record --out benchmarks/results/attention_state.json

Attention is relu(q) S / (relu(q) z), with the state S = relu(k)^T v and the normaliser z = the sum of relu(k) over all tokens
(sana_ref/ops.py). Each case runs the whole sampling with one thing quantized and the rest in fp32; the error is that of the final
latents against fp32's, squared, of their own square. "Once": summed in fp32, then rounded. "As it grows": kept in 8 bits between
tiles of 16 tokens, as a kernel would that has no fp32 state. Scales are found while it runs: a scale a row (of S: a head's channel
of k, over the channels of v; of z: a head).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from benchmarks.figures import record, write_result
from engines.quality_report import Estimate
from engines.store import Store, digest_of
from export.calibration_data import Run, draw, draw_all, plan_runs
from export.fingerprint import code, versions
from export.metrics.pictures import estimate
from export.progress import Pace, Progress
from export.recipe import CalibrationSettings
from sana_ref import ops
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import LayerPlan, QuantizationPlan, groups_of
from sana_ref.quantize_ops import round_dynamic
from sana_ref.quantized import QuantizedLinears

__all__ = ["cases", "geometric", "main", "quantized_state", "results", "summary"]

Kind = Literal["int8", "fp8"]
KINDS: tuple[Kind, ...] = ("int8", "fp8")
PARTS = (("state",), ("normaliser",), ("state", "normaliser"))
TILE = 16  # tokens
PROJECTIONS = "q, k, v projections"
SOURCES = ("benchmarks/attention_state.py",)  # a run's key has what draws it
Round = Callable[[Tensor], Tensor]
Errors = dict[str, dict[Kind, list[float]]]  # case: kind: of each run


def attention(q: Tensor, k: Tensor, v: Tensor, *, state: Round, normaliser: Round, tile: int | None) -> Tensor:
    """ops.relu_linear_attention, with the state (B, H, D, D) and the normaliser (B, H, 1, D) rounded once, or after every tile."""
    q, k, v_wide = q.relu().float(), k.relu().float(), v.float()
    tile = k.shape[-2] if tile is None else tile
    top = bottom = None
    for k_tile, v_tile in zip(k.split(tile, dim=-2), v_wide.split(tile, dim=-2), strict=True):
        part, total = k_tile.mT @ v_tile, k_tile.sum(-2, keepdim=True)
        top = state(part if top is None else top + part)
        bottom = normaliser(total if bottom is None else bottom + total)
    assert top is not None
    assert bottom is not None
    return (q @ top / (q @ bottom.mT + ops.EPS)).to(v.dtype)


@contextmanager
def quantized_state(kind: Kind, parts: Collection[str], tile: int | None = None) -> Iterator[None]:
    """Inside, attention rounds `parts` (state, normaliser). tile: tokens between roundings; None: once, at the end."""

    def rounding(part: str) -> Round:
        return (lambda x: round_dynamic(x, kind)) if part in parts else (lambda x: x)

    def replaced(q: Tensor, k: Tensor, v: Tensor, eps: float = ops.EPS) -> Tensor:
        return attention(q, k, v, state=rounding("state"), normaliser=rounding("normaliser"), tile=tile)

    original = ops.relu_linear_attention
    ops.relu_linear_attention = replaced
    try:
        yield
    finally:
        ops.relu_linear_attention = original


def cases(reference: SanaReference) -> Iterator[tuple[str, Kind, Callable[[], AbstractContextManager[object]]]]:
    """What is quantized, in which format, and what makes it so."""
    transformer = reference.denoiser.transformer
    groups = [group for group in groups_of(name for name, _ in transformer.named_parameters()) if group.endswith("to_qkv")]
    for kind in KINDS:
        plan = QuantizationPlan(layers={group: LayerPlan(format=kind) for group in groups})
        yield PROJECTIONS, kind, partial(QuantizedLinears, transformer, plan)
        for tile, when in ((None, "once"), (TILE, "as it grows")):
            for parts in PARTS:
                yield f"{' and '.join(parts)}, {when}", kind, partial(quantized_state, kind, parts, tile)


def results(reference: SanaReference, runs: Sequence[Run], store: Store, progress: Progress) -> Errors:
    """Case: kind: relative squared error of the final latents, of each run. What a run that was stopped found is in the store."""
    found: Errors = {}
    work = [(case, run) for run in runs for case in cases(reference)]
    pace = Pace(progress, "runs")
    for number, ((name, kind, inside), run) in enumerate(work, 1):

        def make(
            folder: Path,
            inside: Callable[[], AbstractContextManager[object]] = inside,
            run: Run = run,
            left: int = len(work) - number,
        ) -> None:
            with pace.piece(left), inside():
                got = draw(reference, run.spec)[-1].double()
            exact = run.latents[-1].double()
            error = float((got - exact).square().sum() / exact.square().sum())
            (folder / "error.json").write_text(json.dumps(error), encoding="utf-8")

        key = {"stage": "attention state", "case": [name, kind], "run": run.key, "code": code(SOURCES), "versions": versions()}
        error = json.loads((store.get_or_make(digest_of(key), make) / "error.json").read_text(encoding="utf-8"))
        found.setdefault(name, {}).setdefault(kind, []).append(float(error))
    return found


def summary(errors: Errors) -> dict[str, dict[Kind, dict[str, Any]]]:
    """Of each case and kind the error and its 95 % interval over runs; of all but the projections how many times theirs it is."""
    found: dict[str, dict[Kind, dict[str, Any]]] = {}
    for name, kinds in errors.items():
        for kind, values in kinds.items():
            entry: dict[str, Any] = {"error": geometric(values).model_dump(), "runs": values}
            if name != PROJECTIONS:
                times = [each / base for each, base in zip(values, errors[PROJECTIONS][kind], strict=True)]
                entry["of_projections"] = geometric(times).model_dump()
            found.setdefault(name, {})[kind] = entry
    return found


def geometric(values: Sequence[float]) -> Estimate:
    """The geometric mean and its 95 % interval.

    A picture in which an object appears or not has a thousand times the others' error, and would be all of an arithmetic mean.
    """
    log = estimate(np.log(np.array(values))[:, None])
    return Estimate(mean=float(np.exp(log.mean)), low=float(np.exp(log.low)), high=float(np.exp(log.high)))


def _record(found: Mapping[str, Mapping[Kind, Mapping[str, Any]]], how: str) -> None:
    """attention_state_KIND_error_ratio: of state and normaliser kept in 8 bits as they grow, of the projections' error."""
    name = f"{' and '.join(PARTS[-1])}, as it grows"
    for kind in KINDS:
        entry, projections = found[name][kind], found[PROJECTIONS][kind]
        times, error, base = (Estimate(**each) for each in (entry["of_projections"], entry["error"], projections["error"]))
        note = f"{times.text(2)} times the error of quantizing q, k and v's projections ({base.mean:.2e}); {error.mean:.2e} of the "
        note += f"latents' square; {how}"
        print(json.dumps(record(f"attention_state_{kind}_error_ratio", times.mean, "ratio", note=note)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/sana-tiny")
    parser.add_argument("--num-runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=None, help="the checkpoint's unless given")
    parser.add_argument("--side", type=int, default=None, help="px; the checkpoint's unless given")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_state.json"))
    parser.add_argument("--record", action="store_true", help="append attention_state_… to benchmarks/results/figures.jsonl")
    options = parser.parse_args()
    reference, progress, store = SanaReference(options.model), Progress(), Store(options.cache)
    side = options.side or reference.checkpoint.transformer_config.sample_size * reference.checkpoint.vae_config.px_per_latent
    settings = CalibrationSettings(
        prompts=None, num_prompts=options.num_runs, steps=options.steps, sizes=((side, side),), seed=1000, rows=1
    )
    runs = draw_all(reference, plan_runs(reference.checkpoint, settings), store, progress)
    with progress.stage("linear attention, quantized"):
        found = summary(results(reference, runs, store, progress))
    how = f"--num-runs {options.num_runs} --steps {runs[0].spec.steps} --side {side}"
    written = {
        "what": "relative squared error of the final latents, one thing quantized at a time; geometric means over runs, 95 %",
        "checkpoint": reference.checkpoint.digest,
        "command": f"python -m benchmarks.attention_state {how}",
        "versions": versions(),
        "errors": found,
    }
    write_result(options.out, written)
    for case, kinds in found.items():
        shown = [f"{kind} {Estimate(**each['error']).mean:.2e}" for kind, each in kinds.items()]
        shown += [
            f"{kind} {Estimate(**each['of_projections']).text(2)} times" for kind, each in kinds.items() if "of_projections" in each
        ]
        progress.say(f"{case:<36}" + "  ".join(shown))
    if options.record:
        _record(found, f"sana-tiny, fp32 else, {how}")


if __name__ == "__main__":
    main()
