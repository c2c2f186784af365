"""What FP8 and INT8 in the decoder cost: pictures of the same latents, against fp32's. Simulated in PyTorch.

    python benchmarks/decoder_formats.py --model models/sana-tiny --out benchmarks/results/decoder_formats_sana_tiny.json

Latents are what the fp32 reference draws from captions that training never saw. The decoder's residual blocks have the format
(sana_ref/quantized_convs.py), with scales from the parity check's noise times a margin, or from the pictures of a calibration by a
recipe (export/decoder_scales.py); the rest is bf16, as in an engine, and once more fp32, so that their cost alone is seen.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.figures import machine, versions, write_result
from benchmarks.quality import held_out
from engines.errors import SanaError
from engines.spec import PX_PER_LATENT, ShapeRange
from engines.store import Store
from export.calibration_data import RunSpec, default_sizes, draw_all, plan_runs
from export.cases import decoder_cases
from export.decoder_scales import ConvStatistics
from export.metrics.pictures import likeness
from export.progress import Progress
from export.recipe import load_recipe
from runtime.image import to_images
from sana_ref.checkpoint import Checkpoint, load
from sana_ref.components import DecoderForExport
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import QuantizationPlan
from sana_ref.quantize_ops import Rows
from sana_ref.quantized_convs import ConvRanges, QuantizedConvs, conv_plan

__all__ = ["main", "measure", "psnr_db"]

SEED = 7000  # of the first picture; calibrations have 1000 and up
MARGINS: Mapping[Rows, tuple[float, ...]] = {"fp8": (8,), "int8": (1, 2, 3, 4, 6, 8)}
METHODS = ("absmax", "percentile", "mse")


def psnr_db(image: Tensor, exact: Tensor) -> float:
    """Of pictures from -1 to 1, cut to that."""
    return 10 * math.log10(4 / float((image.clamp(-1, 1).double() - exact.clamp(-1, 1).double()).square().mean()))


def plans(reference: SanaReference, store: Store, progress: Progress) -> dict[str, QuantizationPlan | None]:
    """By name. None: nothing is quantised."""
    checkpoint = reference.checkpoint
    side = checkpoint.transformer_config.sample_size * PX_PER_LATENT
    ranges = ShapeRange(min_side=side // 2, opt_side=side, max_side=2 * side, max_batch=4, max_sequence_length=1)
    with torch.inference_mode(), ConvRanges(reference.decoder) as noise:
        for case in decoder_cases(channels=checkpoint.vae_config.latent_channels, ranges=ranges).values():
            reference.decoder(torch.from_numpy(case["latents"]))
    largest = noise.largest()
    found: dict[str, QuantizationPlan | None] = {"bf16": None}
    for kind, margins in MARGINS.items():
        found |= {f"{kind}, {margin:g} x noise": conv_plan(kind, largest, margin) for margin in margins}
    recipe = load_recipe("int8")
    with ConvStatistics(reference.decoder, recipe.calibration.rows) as pictures:
        for run in draw_all(reference, plan_runs(checkpoint, recipe.calibration), store, progress):
            reference.decode(run.latents[-1:])
    seen = {group: float(channels.amax()) / largest[group] for group, channels in pictures.channels.items()}
    progress.say("largest in pictures, of the noise's: " + ", ".join(f"{group} {ratio:.2f}" for group, ratio in seen.items()))
    for method in METHODS:
        found[f"int8, pictures, {method}"] = pictures.plan("int8", load_recipe("int8", [f"method={method}"]))
    return found


def _specs(checkpoint: Checkpoint, captions: int) -> list[RunSpec]:
    texts = [question.text for question in held_out(checkpoint.folder, captions)]
    sizes, sampler = default_sizes(checkpoint), checkpoint.sampler
    return [
        RunSpec(
            prompt=text,
            seed=SEED + number,
            width=sizes[number % len(sizes)][0],
            height=sizes[number % len(sizes)][1],
            steps=sampler.num_steps,
            guidance=sampler.guidance_scale,
        )
        for number, text in enumerate(texts[:: max(1, len(texts) // captions)][:captions])
    ]


@torch.inference_mode()
def measure(
    decoders: Mapping[str, nn.Module], latents: Sequence[Tensor], plan: QuantizationPlan | None, exact: Sequence[Tensor]
) -> dict[str, list[float]]:
    """decoders: "bf16" and "fp32", of the rest. latents: (1, C, h, w) each; exact: their pictures, (1, 3, H, W).

    PSNR in dB, which says of fp32 nothing without a plan, and LPIPS of the first; an entry a picture.
    """
    found: dict[str, list[float]] = {}
    for rest, decoder in decoders.items():
        if plan is None and rest == "fp32":
            continue
        with nullcontext() if plan is None else QuantizedConvs(decoder, plan):
            got = [decoder(z).float() for z in latents]
        found[f"psnr_db_rest_{rest}"] = [psnr_db(*pair) for pair in zip(got, exact, strict=True)]
        if rest == "bf16":
            pairs = [(to_images(a.numpy()), to_images(b.numpy())) for a, b in zip(exact, got, strict=True)]
            found["lpips"] = [likeness(*pair)[0].lpips for pair in pairs]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for a checkpoint that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint with held-out captions")
    parser.add_argument("--captions", type=int, default=8, metavar="N", help="a picture each")
    parser.add_argument("--cache", type=Path, help="where latents are kept; that of builds")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the numbers there")
    options = parser.parse_args(arguments)
    progress, found = Progress(), dict[str, dict[str, Any]]()
    try:
        checkpoint, store = load(options.model), Store(options.cache)
        reference = SanaReference(checkpoint)
        specs = _specs(checkpoint, options.captions)
        latents = [run.latents[-1:] for run in draw_all(reference, specs, store, progress)]
        exact = [reference.decode(z) for z in latents]
        decoders = {"bf16": DecoderForExport(checkpoint.vae(torch.bfloat16)).eval(), "fp32": reference.decoder}
        for name, plan in plans(reference, store, progress).items():
            found[name] = measure(decoders, latents, plan, exact)
            means = ", ".join(f"{what} {np.mean(values):.5g}" for what, values in found[name].items())
            print(f"{name}: {means}", flush=True)
    except (SanaError, FileNotFoundError) as error:
        print(f"decoder_formats: {error}", file=sys.stderr)
        return 1
    if options.out is not None:
        captions = [spec.prompt for spec in specs]
        write_result(options.out, {"captions": captions, "machine": machine(), "versions": versions(), "formats": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
