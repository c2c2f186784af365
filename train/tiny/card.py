"""The model card: what the model is, what was measured, how it was made.

Figures come from the JSON that training leaves; one that was not measured is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.tiny.captions import KIND_NAMES
from train.tiny.models import BUCKETS

TEMPLATE = """\
---
license: apache-2.0
pipeline_tag: text-to-image
tags: [sana, text-to-image, tiny]
---
# sana-tiny

A complete Sana text-to-image model, small enough to ship with the code. It draws scenes of {num_emoji} emoji (alone,
in pairs, two or three of the same) on {num_colours} plain background colours, from captions in six languages. It
exists so that export, engines, quantization and adapters can be tried and judged on a real model on any machine. It
is not a general image generator.

![held-out captions and what the model draws](samples.png)

{parts}

Sizes it was trained for: {sizes} px. Sampler: DPM-Solver++ for flows, 20 steps, flow_shift {flow_shift}, guidance
{guidance}. Prompts are lower-cased and preceded by the instruction in `model_index.json`.

## What it can do, measured

Captions of combinations that transformer and text encoder never saw (an emoji on a colour; two emoji together), drawn
with these weights by PyTorch on {device} and judged by the recogniser. "Objects right" asks for every object in its
place.

{scores}

Single objects by language of the caption: {languages}.

How to read these figures:

- They come from a closed world. The recogniser knows {num_emoji} emoji and {num_colours} colours, picks the likeliest
  of each and cannot answer "none of them"; emoji that are hard to tell apart were left out on purpose. A high share
  says that the right emoji is the nearest one. It says nothing about how good the picture looks.
- Pictures are blurrier than the emoji they were learned from, and fine parts (faces, spokes, blades) are often wrong;
  see the samples. The autoencoder gives back held-out scenes at {psnr_256} (256 x 256) and {psnr_320} (320 x 320).
- What is new in a held-out caption is the combination. Every emoji, colour and kind of scene by itself was seen in
  training.
- The recogniser was trained on composed scenes, half of them seen through the autoencoder, and on no picture of the
  model. On scenes of another seed it names {judge_composed} of the emoji as composed and {judge_decoded} after the
  autoencoder.

`python benchmarks/recognised.py` measures the same with a bundle, as the runtime draws.

## How it was made

1. `python -m train.tiny.prepare_sprites` draws the emoji and collects their names (Unicode CLDR, through the Python
   package `emoji`).
2. `python -m train.tiny` composes scenes, trains the autoencoder, encodes scenes of {num_sizes} sizes once, and
   trains transformer and text encoder together by flow matching. Its last run: {steps} steps in {seconds} s on
   {device}.
3. `python -m train.tiny.export_tiny` writes this folder.
{note}
Which combinations are held out is decided by a hash in `train/tiny/captions.py`; `held_out_captions.json` lists captions
of them, and `metrics.json` has everything that was measured.

## Licences

The pictures are those of Noto Color Emoji, copyright Google Inc., under the SIL Open Font License 1.1 (OFL); the font
itself is not part of this folder. Names of emoji come from Unicode CLDR (Unicode License v3). Weights and code:
Apache-2.0.
"""


def card(record: Mapping[str, Any], weight_bytes: Mapping[str, int], *, note: str = "") -> str:
    """record: tiny.json; weight_bytes: by component; note: what else a reader must know of how it was made."""
    metrics, configs = record["metrics"], record["configs"]
    vae, judge, found = (metrics.get(name, {}) for name in ("vae", "recogniser", "eval"))
    part_rows = [
        ("text encoder", f"Gemma-2 trunk, {configs['text_encoder']['num_hidden_layers']} layers", "bf16", "text_encoder"),
        ("transformer", f"SanaTransformer2DModel, {configs['transformer']['num_layers']} layers", "fp16", "transformer"),
        ("autoencoder", "AutoencoderDC f32c32", "bf16", "vae"),
        ("recogniser (the judge; not needed to draw)", "small residual network", "fp16", "recogniser"),
    ]
    score_rows = [
        (kind.replace("_", " "), str(found[kind]["questions"]), _percent(found[kind]["correct"]), _percent(found[kind]["colour"]))
        for kind in KIND_NAMES
        if kind in found
    ]
    by_language = found.get("single", {}).get("by_language", {})
    return TEMPLATE.format(
        num_emoji=len(record["names"]),
        num_colours=len(record["colours"]),
        parts=_table(
            ("part", "class", "weights", "size"),
            [(part, kind, dtype, f"{weight_bytes[name] / 1e6:.1f} MB") for part, kind, dtype, name in part_rows],
        ),
        sizes=", ".join(f"{width} x {height}" for width, height in BUCKETS.values()),
        num_sizes=len(BUCKETS),
        flow_shift=record["flow_shift"],
        guidance=found.get("guidance", 4.5),
        scores=_table(("scene", "captions", "objects right", "background right"), score_rows) if score_rows else "Not measured.",
        languages=", ".join(f"{code} {_percent(value)}" for code, value in by_language.items()) or "not measured",
        psnr_256=_decibels(vae.get("256x256", {}).get("psnr_db")),
        psnr_320=_decibels(vae.get("320x320", {}).get("psnr_db")),
        judge_composed=_percent(judge.get("composed", {}).get("emoji")),
        judge_decoded=_percent(judge.get("decoded", {}).get("emoji")),
        steps=f"{metrics['dit_steps']:,}",
        seconds=metrics["dit_seconds"],
        device=record["device"],
        note=f"\n{note}\n" if note else "",
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"


def _decibels(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} dB"
