"""Lays out what training handed over as a model folder with the names of the published ones: `python -m train.export_tiny DIR
models/sana-tiny`.

DIR holds vae, transformer, text_encoder, recogniser (.safetensors) and tiny.json, as `train.tiny --out` writes them. The card
takes its figures from the JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from train.captions import KIND_NAMES, SINGLE
from train.evaluate import held_out_questions
from train.models import BUCKETS, SCHEDULER
from train.tokenizer import BOS_ID, EOS_ID, INSTRUCTION, PAD_ID, SPECIAL_TOKENS, UNK_ID

WEIGHT_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "recogniser": "recogniser/model.safetensors",
}
GRIDS = {"grid_256.png": "samples.png"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lay_out(source: Path, target: Path) -> None:
    """Write the model folder. Raises FileNotFoundError if a part is missing from `source`."""
    record = json.loads((source / "tiny.json").read_text(encoding="utf-8"))
    missing = [name for name in WEIGHT_FILES if not (source / f"{name}.safetensors").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source}: got no {', '.join(missing)}; expected all of {', '.join(WEIGHT_FILES)}. Finish train.tiny first"
        )
    configs, metrics = record["configs"], record["metrics"]
    for name, place in WEIGHT_FILES.items():
        path = target / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((source / f"{name}.safetensors").read_bytes())
    version = {"_diffusers_version": "0.42.1"}
    write_json(target / "vae/config.json", {**configs["vae"], **version, "scaling_factor": metrics["scaling_factor"]})
    write_json(target / "transformer/config.json", {**configs["transformer"], **version})
    write_json(target / "text_encoder/config.json", {**configs["text_encoder"], "dtype": "bfloat16"})
    write_json(target / "scheduler/scheduler_config.json", {**SCHEDULER, **version, "flow_shift": record["flow_shift"]})
    write_json(
        target / "recogniser/config.json",
        {
            **configs["recogniser"],
            "classes": [names["en"][0] for names in record["names"]],
            "characters": record["characters"][: len(record["names"])],
            "colours": record["colours"],
        },
    )
    (target / "tokenizer").mkdir(parents=True, exist_ok=True)
    (target / "tokenizer/tokenizer.json").write_text(json.dumps(record["tokenizer"], ensure_ascii=False), encoding="utf-8")
    tokens = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    write_json(
        target / "tokenizer/tokenizer_config.json",
        {
            **tokens,
            "added_tokens_decoder": {
                str(index): {
                    "content": token,
                    "special": True,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                }
                for token, index in zip(SPECIAL_TOKENS, (PAD_ID, EOS_ID, BOS_ID, UNK_ID), strict=True)
            },
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_max_length": configs["text_encoder"]["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(
        target / "model_index.json",
        {
            "_class_name": "SanaPipeline",
            **version,
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "Gemma2Model"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderDC"],
            "complex_human_instruction": list(INSTRUCTION),
            "max_sequence_length": 300,
        },
    )
    write_json(target / "metrics.json", {key: metrics[key] for key in sorted(metrics) if key not in ("dit_losses", "probe")})
    held_out = {
        KIND_NAMES[kind]: [
            {"caption": q.text, "language": q.language, "first": q.scene.first, "second": q.scene.second, "colour": q.scene.colour}
            for q in held_out_questions(kind, 400 if kind == SINGLE else 100, record["names"], seed=9)
        ]
        for kind in range(len(KIND_NAMES))
    }
    write_json(target / "held_out_captions.json", held_out)
    for name, place in GRIDS.items():
        if (source / name).is_file():
            (target / place).write_bytes((source / name).read_bytes())
    (target / "README.md").write_text(card(record, target), encoding="utf-8")


def card(record: dict[str, Any], target: Path) -> str:
    """The model card. Figures that the training did not measure are said to be missing."""
    metrics, names = record["metrics"], record["names"]
    vae, judge, found = metrics.get("vae", {}), metrics.get("recogniser", {}), metrics.get("eval", {})

    def percent(value: Any) -> str:
        return "not measured" if value is None else f"{100 * float(value):.1f} %"

    def decibels(bucket: str) -> str:
        value = vae.get(bucket, {}).get("psnr_db")
        return "not measured" if value is None else f"{value:.1f} dB"

    sizes = {path.parent.name: path.stat().st_size / 1e6 for path in (target / place for place in WEIGHT_FILES.values())}
    rows = [(kind.replace("_", " "), found[kind]) for kind in KIND_NAMES if kind in found]
    scores = "\n".join(
        f"| {kind} | {row['questions']} | {percent(row['correct'])} | {percent(row['colour'])} |" for kind, row in rows
    )
    languages = ", ".join(f"{code} {percent(value)}" for code, value in found.get("single", {}).get("by_language", {}).items())
    guidance = found.get("guidance", 4.5)
    return f"""---
license: apache-2.0
pipeline_tag: text-to-image
tags: [sana, text-to-image, tiny]
---
# sana-tiny

A complete Sana text-to-image model, small enough to ship with the code: it draws scenes of {len(names)} emoji, alone, in pairs
or in small groups, on {len(record["colours"])} plain background colours, from captions in six languages. It exists so that
export, engines, quantization and adapters can be tried and judged on a real model on any machine. It is not a general image
generator.

![held-out captions and what the model draws](samples.png)

| part | class | file |
|---|---|---|
| text encoder | Gemma-2 trunk, {record["configs"]["text_encoder"]["num_hidden_layers"]} layers, bf16 |
{sizes["text_encoder"]:.1f} MB | | transformer | SanaTransformer2DModel, {record["configs"]["transformer"]["num_layers"]}
layers, fp16 | {sizes["transformer"]:.1f} MB | | autoencoder | AutoencoderDC f32c32, bf16 | {sizes["vae"]:.1f} MB | | recogniser
(the judge; not needed to draw) | small residual network, fp16 | {sizes["recogniser"]:.1f} MB |

Sizes it was trained for: {", ".join(f"{w} x {h}" for w, h in BUCKETS.values())} px. Sampler: DPM-Solver++ for flows, 20 steps,
flow_shift {record["flow_shift"]}, guidance {guidance}. Prompts are lower-cased and preceded by the instruction in
`model_index.json`.

## What it can do, measured

Captions of combinations that training never saw (an emoji on a colour; two emoji together), judged by the recogniser. "right"
asks for every object in its place.

| scene | captions | right | background right |
|---|---|---|---|
{scores or "| not measured | | | |"}

Single objects by language of the caption: {languages or "not measured"}.
The recogniser was trained on composed scenes only. On scenes it has not seen it names {
        percent(judge.get("composed", {}).get("emoji"))
    } of the emoji as composed and {percent(judge.get("decoded", {}).get("emoji"))} after the autoencoder. The
autoencoder gives back held-out scenes at {decibels("256x256")} (256 x 256) and {decibels("320x320")} (320 x 320).

## How it was made

1. `python -m train.prepare_sprites` draws the emoji and collects their names (Unicode CLDR, through the Python package `emoji`).
2. `python -m train.tiny` composes scenes on the GPU, trains the autoencoder, encodes {sum(1 for _ in BUCKETS)} sizes of scenes
once, and trains transformer and text encoder together by flow matching ({metrics.get("dit_steps", "?")} steps,
{metrics.get("dit_seconds", "?")} s on {record["device"]}). 3. `python -m train.export_tiny` wrote this folder.

Which combinations are held out is decided by a hash in `train/captions.py`; `held_out_captions.json` lists captions of them.

## Licences

The pictures are those of Noto Color Emoji, copyright Google Inc., under the SIL Open Font License 1.1; the font itself is not
part of this folder. Names of emoji come from Unicode CLDR (Unicode License v3). Weights and code: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    lay_out(args.source, args.target)
    total = sum(path.stat().st_size for path in args.target.rglob("*") if path.is_file())
    print(f"{args.target}: {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
