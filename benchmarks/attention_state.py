"""Why linear attention's state and normaliser stay in fp32: what quantizing them costs, beside quantizing what makes them.

    python -m benchmarks.attention_state --model models/sana-tiny --out benchmarks/results/attention_state.json

Attention is relu(q) S / (relu(q) z), with the state S = relu(k)^T v and the normaliser z = the sum of relu(k) over all tokens
(sana_ref/ops.py). Each case runs the whole sampling with one thing quantized and the rest in fp32; the error is that of the final
latents against fp32's, squared, of their own square. "Once": summed in fp32, then rounded. "As it grows": kept in 8 bits between
tiles of 16 tokens, as a kernel would that has no fp32 state. Scales are found while it runs: a scale a row (of S: a head's channel
of k, over the channels of v; of z: a head).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

from engines.store import Store
from export.calibration_data import Run, draw, draw_all, plan_runs
from export.fingerprint import versions
from export.progress import Progress
from export.recipe import CalibrationSettings
from export.sensitivity import latent_error
from sana_ref import ops
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import LayerPlan, QuantizationPlan, groups_of
from sana_ref.quantize_ops import round_dynamic

__all__ = ["main", "quantized_state", "results"]

Kind = Literal["int8", "fp8"]
KINDS: tuple[Kind, ...] = ("int8", "fp8")
PARTS = (("state",), ("normaliser",), ("state", "normaliser"))
TILE = 16  # tokens
Round = Callable[[Tensor], Tensor]


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


def results(reference: SanaReference, runs: list[Run]) -> dict[str, dict[str, float]]:
    """Case: kind: relative squared error of the final latents, the mean over runs."""
    groups = [g for g in groups_of(n for n, _ in reference.denoiser.transformer.named_parameters()) if g.endswith("to_qkv")]
    found: dict[str, dict[str, float]] = {"q, k, v projections": {}}
    for kind in KINDS:
        plan = QuantizationPlan(layers={group: LayerPlan(format=kind) for group in groups})
        found["q, k, v projections"][kind] = latent_error(reference, plan, runs)
        for tile, when in ((None, "once"), (TILE, "as it grows")):
            for parts in PARTS:
                with quantized_state(kind, parts, tile):
                    found.setdefault(f"{' and '.join(parts)}, {when}", {})[kind] = _error(reference, runs)
    return found


def _error(reference: SanaReference, runs: list[Run]) -> float:
    total = 0.0
    for run in runs:
        got, exact = draw(reference, run.spec)[-1].double(), run.latents[-1].double()
        total += float((got - exact).square().sum() / exact.square().sum())
    return total / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/sana-tiny")
    parser.add_argument("--num-runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None, help="the checkpoint's unless given")
    parser.add_argument("--side", type=int, default=None, help="px; the checkpoint's unless given")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_state.json"))
    options = parser.parse_args()
    reference, progress = SanaReference(options.model), Progress()
    side = options.side or reference.checkpoint.transformer_config.sample_size * reference.checkpoint.vae_config.px_per_latent
    settings = CalibrationSettings(
        prompts=None, num_prompts=options.num_runs, steps=options.steps, sizes=((side, side),), seed=1000, rows=1
    )
    runs = draw_all(reference, plan_runs(reference.checkpoint, settings), Store(options.cache), progress)
    with progress.stage("linear attention, quantized"):
        found = results(reference, runs)
    record = {
        "what": "relative squared error of the final latents, mean over runs, one thing quantized at a time",
        "checkpoint": reference.checkpoint.digest,
        "command": f"python -m benchmarks.attention_state --num-runs {options.num_runs} --steps {runs[0].spec.steps} --side {side}",
        "versions": versions(),
        "errors": found,
    }
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}.new")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, options.out)
    for case, errors in found.items():
        progress.say(f"{case:<36}" + "  ".join(f"{kind} {error:.2e}" for kind, error in errors.items()))


if __name__ == "__main__":
    main()
