"""Lays out what training handed over as a model folder, under the names of the published ones.

    python -m train.tiny.export_tiny DIR models/sana-tiny

DIR holds vae, transformer, text_encoder, recogniser (.safetensors) and tiny.json, as `train.tiny --out` writes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from train.tiny.captions import KIND_NAMES, SINGLE
from train.tiny.card import card
from train.tiny.evaluate import held_out_questions
from train.tiny.models import SCHEDULER
from train.tiny.tokenizer import BOS_ID, EOS_ID, INSTRUCTION, PAD_ID, SPECIAL_TOKENS, UNK_ID

WEIGHT_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "recogniser": "recogniser/model.safetensors",
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lay_out(source: Path, target: Path, *, note: str = "") -> None:
    """Write the model folder; `note` goes into its card. Raises FileNotFoundError if a part is missing from `source`."""
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
    write_json(target / "metrics.json", {key: metrics[key] for key in sorted(metrics) if key != "dit_losses"})
    held_out = {
        KIND_NAMES[kind]: [
            {"caption": q.text, "language": q.language, "first": q.scene.first, "second": q.scene.second, "colour": q.scene.colour}
            for q in held_out_questions(kind, 400 if kind == SINGLE else 100, record["names"], seed=9)
        ]
        for kind in range(len(KIND_NAMES))
    }
    write_json(target / "held_out_captions.json", held_out)
    (target / "samples.png").write_bytes((source / "grid_256.png").read_bytes())
    weight_bytes = {name: (target / place).stat().st_size for name, place in WEIGHT_FILES.items()}
    (target / "README.md").write_text(card(record, weight_bytes, note=note), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--note", default="", help="what the card adds on how the model was made, such as earlier runs")
    args = parser.parse_args()
    lay_out(args.source, args.target, note=args.note)
    total = sum(path.stat().st_size for path in args.target.rglob("*") if path.is_file())
    print(f"{args.target}: {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
