"""What quantizing each group alone does to the result of a whole sampling run.

    table = measure(reference, {"nvfp4": plan}, runs, store=store, progress=progress)
    table["transformer_blocks.0.attn1.to_qkv"]["nvfp4"]     # relative squared error of the final latents

Truth is the fp32 reference's own run from the same noise. Each (group, format) is one entry of the store: a pass that was killed
goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.errors import CheckpointError
from engines.store import Store, digest_of
from export.calibration_data import SOURCES, Run, draw
from export.fingerprint import code
from export.progress import Pace, Progress
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import Format, QuantizationPlan, plan_digest
from sana_ref.quantized import QuantizedLinears

__all__ = ["Table", "latent_error", "measure", "only"]

Table = dict[str, dict[Format, float]]  # group: format: relative squared error of the final latents, the mean over runs
_FILE = "error.json"
_SOURCES = (*SOURCES, "export/sensitivity.py")


def measure(
    reference: SanaReference, plans: Mapping[Format, QuantizationPlan], runs: Sequence[Run], *, store: Store, progress: Progress
) -> Table:
    """plans: of each format, with the groups to look at. runs: of the reference in fp32, whose latents are the truth."""
    table: Table = {}
    work = [(group, kind, plan) for kind, plan in plans.items() for group in plan.layers]
    done = 0
    with progress.stage("sensitivity") as stage:
        pace = Pace(progress, "groups of layers alone")
        for number, (group, kind, plan) in enumerate(work, 1):
            alone = only(plan, group)

            def make(folder: Path, alone: QuantizationPlan = alone, left: int = len(work) - number) -> None:
                nonlocal done
                done += 1
                with pace.piece(left):
                    error = latent_error(reference, alone, runs)
                (folder / _FILE).write_text(json.dumps(error), encoding="utf-8")

            folder = store.get_or_make(_key(alone, runs), make)
            table.setdefault(group, {})[kind] = float(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        stage.cached = not done
        stage.note(f"{len(work)} measured on {len(runs)} runs, {len(work) - done} of them from the cache")
    return table


def latent_error(reference: SanaReference, plan: QuantizationPlan, runs: Sequence[Run]) -> float:
    """|x - x_reference|^2 / |x_reference|^2 of the final latents x with `plan`, the mean over runs.

    Raises CheckpointError if it is not finite.
    """
    total = 0.0
    for run in runs:
        with QuantizedLinears(reference.denoiser.transformer, plan):
            got = draw(reference, run.spec)[-1].double()
        exact = run.latents[-1].double()
        total += float((got - exact).square().sum() / exact.square().sum())
    if not math.isfinite(total):
        named = ", ".join(list(plan.layers)[:3])
        raise CheckpointError(
            f"{named}: got latents that are not finite with these groups quantized; expected numbers. Keep them precise."
        )
    return total / len(runs)


def only(plan: QuantizationPlan, group: str) -> QuantizationPlan:
    """The plan of one group."""
    tensors = {name: tensor for name, tensor in plan.tensors.items() if name.rpartition(".")[0] == group}
    return QuantizationPlan(layers={group: plan.layers[group]}, tensors=tensors)


def _key(plan: QuantizationPlan, runs: Sequence[Run]) -> str:
    return digest_of(
        {
            "stage": "sensitivity",
            "plan": plan_digest(plan),
            "runs": [run.key for run in runs],
            "code": code(_SOURCES),
        }
    )
