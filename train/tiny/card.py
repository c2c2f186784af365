"""The model card: what the model is, what was measured, how it was made.

Figures come from the JSON that training leaves; one that was not measured is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.tiny.captions import COLOUR_NAMES, KIND_NAMES
from train.tiny.models import FLOW_SHIFT

JUDGED = "pictures judged"  # of `seconds`: no part of the training

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
{guidance}. Prompts are lower-cased and preceded by the instruction in `model_index.json`. `vae_lite/` has the encoder
of `vae/` and a smaller decoder for the same latents; a bundle is built with `vae/`.

## What it can do, measured

Captions of combinations that transformer and text encoder never saw (an emoji on a colour; two emoji together), drawn
with these weights by PyTorch on {judged_on} and judged by the recogniser. "Objects right" asks for every object in its
place.

{scores}

Single objects by language of the caption: {languages}.

How to read these figures:

- They come from a closed world. The recogniser knows {num_emoji} emoji and {num_colours} colours, picks the likeliest
  of each and cannot answer "none of them"; emoji that are hard to tell apart were left out on purpose. A high share
  says that the right emoji is the nearest one. It says nothing about how good the picture looks.
- The emoji are 128 px wide in their font and drawn up to 380 px wide, so pictures are soft; fine parts (faces, spokes,
  blades) can be wrong, see the samples. The autoencoder gives back scenes kept out of its training at {psnr_full}, with
  the Lite decoder at {psnr_lite}.
- What is new in a held-out caption is the combination. Every emoji, colour and kind of scene by itself was seen in
  training.
- The recogniser was trained on composed scenes, half of them seen through the autoencoder, and on no picture of the
  model. On scenes of another seed it names {judge_composed} of the emoji as composed and {judge_decoded} after the
  autoencoder.

`python benchmarks/quality.py` measures the same with a model folder or a bundle, with confidence intervals and a page
of pictures.

## How to train it again

```
python -m train.tiny.prepare_sprites --out out/sprites.safetensors    # once; needs the font Noto Color Emoji
python -m train.tiny --sprites out/sprites.safetensors --work out/sana-tiny-training
```

One command on one GPU runs five experiments of the training system, each from its own file in `configs/experiment/`, and
goes on where it was if it is stopped:

{stages}

Together {minutes} minutes on {device}. Scenes are composed on the GPU and never stored; latents and text embeddings are
cached once. The text encoder learns what captions say (kind, objects, colour) and is frozen; the transformer is trained
by flow matching on the cache, {samples} pictures in all.
{note}Which combinations are held out is decided by a hash in `train/tiny/captions.py`; `held_out_captions.json` lists captions
of them, and `metrics.json` has everything that was measured.

## Licences

The pictures are those of Noto Color Emoji, copyright Google Inc., under the SIL Open Font License 1.1 (OFL); the font
itself is not part of this folder. Names of emoji come from Unicode CLDR (Unicode License v3). Weights and code:
Apache-2.0.
"""


def card(record: Mapping[str, Any], weight_bytes: Mapping[str, int]) -> str:
    """record: what `train.tiny` leaves as metrics.json; weight_bytes: by component."""
    judge, found = record.get("recogniser", {}), record.get("eval", {})
    layers, text_layers = record["num_layers"], record["text_layers"]
    part_rows = [
        ("text encoder", f"Gemma-2 trunk, {text_layers} layers", "bf16", "text_encoder"),
        ("transformer", f"SanaTransformer2DModel, {layers} layers", "fp16", "transformer"),
        ("autoencoder, Full", "AutoencoderDC f32c32", "bf16", "vae"),
        ("autoencoder, Lite", "AutoencoderDC f32c32, the same encoder", "bf16", "vae_lite"),
        ("recogniser (the judge; not needed to draw)", "small residual network", "fp16", "recogniser"),
    ]
    score_rows = [
        (kind.replace("_", " "), str(found[kind]["questions"]), _percent(found[kind]["correct"]), _percent(found[kind]["colour"]))
        for kind in KIND_NAMES
        if kind in found
    ]
    by_language = found.get("single", {}).get("by_language", {})
    spent = {name: seconds for name, seconds in record["seconds"].items() if name != JUDGED}
    stage_rows = [(f"`{name}`" if "_" in name else name, f"{seconds:.0f} s") for name, seconds in spent.items()]
    return TEMPLATE.format(
        num_emoji=record["num_classes"],
        num_colours=len(COLOUR_NAMES),
        parts=_table(
            ("part", "class", "weights", "size"),
            [(part, kind, dtype, f"{weight_bytes[name] / 1e6:.1f} MB") for part, kind, dtype, name in part_rows],
        ),
        sizes=", ".join(f"{width} x {height}" for width, height in record["sizes"]),
        flow_shift=FLOW_SHIFT,
        guidance=found.get("guidance", 4.5),
        scores=_table(("scene", "captions", "objects right", "background right"), score_rows) if score_rows else "Not measured.",
        languages=", ".join(f"{code} {_percent(value)}" for code, value in by_language.items()) or "not measured",
        psnr_full=_decibels(record.get("dcae", {}).get("psnr_db")),
        psnr_lite=_decibels(record.get("dcae_lite", {}).get("psnr_db")),
        judge_composed=_percent(judge.get("composed", {}).get("emoji")),
        judge_decoded=_percent(judge.get("decoded", {}).get("emoji")),
        stages=_table(("experiment, or what is done", "time"), stage_rows),
        minutes=f"{sum(spent.values()) / 60:.1f}",
        samples=f"{record['pictures_seen']:,}",
        device=record["device"],
        judged_on=record["judged_on"],
        note="".join(f"\n{line}\n" for line in record.get("notes", ())),
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"


def _decibels(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} dB"
