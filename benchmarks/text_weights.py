"""What narrow weights of the text encoder and the text projection cost: embeddings and pictures, against the fp32 reference's.

    python benchmarks/text_weights.py --model models/sana-tiny --formats int8:int8,fp8:fp8,int4:int8 --pictures 4 \
        --out benchmarks/results/text_weights_sana_tiny.json

A format is text encoder:text projection, `none` for 16 bits; int8/int4:int8 has the text encoder's table of tokens in int4, and
int8/host:int8 in the component's 16 bits on the host; w8a8/host:int8 its activations in int8 too, by a calibration of the recipe
int8, w8a8-unsmoothed/host:int8 without smoothing. All else is the fp32 reference, so their cost alone is measured.
Embeddings are of captions that training never saw; the pictures are of the first of them, with seeds from 0 on. A format is written
when it is measured, and what --out has of the same captions, pictures, machine and versions is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.figures import machine, versions, write_result
from benchmarks.quality import held_out
from engines.errors import SanaError, SpecError
from engines.spec import nearest
from engines.store import Store
from export.metrics.pictures import likeness
from export.quantization_plan import PLAN
from export.recipe import load_recipe
from export.text_calibration import calibrate_text
from export.weight_only import Weights
from sana_ref.checkpoint import Checkpoint, load
from sana_ref.components import TOKEN_TABLE, TextEncoderForExport
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import QuantizationPlan, group_of, load_plan
from sana_ref.quantized import QuantizedLinears
from sana_ref.text_projection import is_text_parameter
from sana_ref.weight_only import (
    HOST,
    WEIGHT_FORMATS,
    TextFormat,
    TextPart,
    WeightFormat,
    formats_of,
    pack_weight,
)

__all__ = ["main", "parse_formats", "plan_for", "quantize"]

SMOOTHING = {"w8a8": "0.5", "w8a8-unsmoothed": "null"}  # a recipe's text_encoder_smoothquant


def parse_formats(word: str) -> dict[TextPart, TextFormat]:
    """Raises SpecError."""
    encoder, colon, projection = word.partition(":")
    encoder, slash, table = encoder.partition("/")
    if not colon:
        raise SpecError(f"formats: got {word!r}; expected two, as in int4:int8: of the text encoder and of the text projection.")
    asked: list[tuple[TextPart, str]] = [("text_encoder", encoder), ("text_projection", projection)]
    if slash:
        asked.insert(1, ("text_encoder_table", table))
    found: dict[TextPart, TextFormat] = {}
    more: dict[TextPart, Iterable[str]] = {"text_encoder": SMOOTHING, "text_encoder_table": (HOST,)}
    for name, part in asked:
        valid = [*WEIGHT_FORMATS, *more.get(name, ())]
        if part not in (*valid, "none"):
            raise SpecError(f"formats: got {part!r} in {word!r}; {nearest(part, [*valid, 'none'])}.")
        if part != "none":
            found[name] = "w8a8" if part in SMOOTHING else next(each for each in (*WEIGHT_FORMATS, HOST) if each == part)
    return found


def plan_for(word: str, checkpoint: Checkpoint, store: Store) -> QuantizationPlan | None:
    """Of the activations that a format says to be int8; None: of none. Raises what calibrate_text raises."""
    encoder = word.partition(":")[0].partition("/")[0]
    if encoder not in SMOOTHING:
        return None
    recipe = load_recipe("int8", ["text_encoder=w8a8", f"text_encoder_smoothquant={SMOOTHING[encoder]}"])
    return load_plan(calibrate_text(checkpoint, recipe, store=store) / PLAN)


class Planned(nn.Module):
    """A text encoder whose planned layers compute in 8 bits."""

    def __init__(self, encoder: TextEncoderForExport, plan: QuantizationPlan) -> None:
        super().__init__()
        self.encoder = encoder
        self._layers = QuantizedLinears(encoder.encoder, plan)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with self._layers:
            return self.encoder(input_ids, attention_mask)


def quantize(reference: SanaReference, weights: Weights, plan: QuantizationPlan | None = None) -> None:
    """Give the reference, in place, the weights that a bundle of these formats computes with, and with w8a8 its `plan`.

    Raises SpecError for w8a8 without one.
    """
    transformer = reference.text_projection.transformer
    encoder, table, projection = (weights.get(part) for part in get_args(TextPart))
    assert table != "w8a8"  # which is of the encoder's products
    if encoder == "w8a8" and plan is None:
        raise SpecError("text_encoder: got w8a8 without a plan of its activations; expected one, or int8: its weights alone.")
    of_text = {name: kind for name, kind in formats_of(transformer, _weights(projection)).items() if is_text_parameter(name)}
    if table == HOST:
        stored = reference.text_encoder.get_parameter(TOKEN_TABLE)
        with torch.no_grad():
            stored.copy_(stored.bfloat16())  # as the file has it
    formats = formats_of(reference.text_encoder, _weights(encoder), table)
    planned = {} if plan is None else plan.layers
    _quantize(
        reference.text_encoder, {name: kind for name, kind in formats.items() if group_of(name) not in planned}, torch.bfloat16
    )
    _quantize(transformer, of_text, torch.float16)
    if plan is not None:
        reference.text_encoder = Planned(reference.text_encoder, plan)  # type: ignore[assignment]


def _weights(kind: TextFormat | None) -> WeightFormat | None:
    assert kind != HOST  # which is of the table
    return "int8" if kind == "w8a8" else kind


def _quantize(module: nn.Module, formats: Mapping[str, WeightFormat], dtype: torch.dtype) -> None:
    with torch.no_grad():
        for name, kind in formats.items():
            weight = module.get_parameter(name)
            weight.copy_(pack_weight(weight, kind, name, dtype).real())


def _embeddings(reference: SanaReference, captions: Sequence[str]) -> list[Tensor]:
    """(tokens, C) of each, without padding."""
    embeds, mask = reference.encode_prompts(captions)
    return [row[kept > 0] for row, kept in zip(embeds, mask, strict=True)]


def _draw(reference: SanaReference, captions: Sequence[str]) -> list[Image.Image]:
    return [reference.generate(caption, seed=seed)[0] for seed, caption in enumerate(captions)]


def measure(exact: Sequence[Tensor], got: Sequence[Tensor]) -> dict[str, float]:
    """rms: of the difference, of the exact embeddings' own. cosine: a token, the mean and the least."""
    want, have = torch.cat(list(exact)).double(), torch.cat(list(got)).double()
    cosines = torch.cosine_similarity(want, have, dim=-1)
    return {
        "embedding_rms": float(((have - want).square().sum() / want.square().sum()).sqrt()),
        "embedding_cosine": float(cosines.mean()),
        "embedding_least_cosine": float(cosines.min()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint with held-out captions")
    parser.add_argument("--formats", default="int8:int8,fp8:fp8,int4:int8", metavar="NAMES")
    parser.add_argument(
        "--captions", type=int, default=20, metavar="N", help="whose embeddings are compared, of each kind of scene"
    )
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="0: none")
    parser.add_argument("--cache", type=Path, help="where finished texts of a calibration are kept")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the numbers there, beside those it has")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for a checkpoint or formats that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        wanted = {word: parse_formats(word) for word in options.formats.split(",")}
        checkpoint = load(options.model)
        questions = held_out(checkpoint.folder, options.captions)
        captions = [question.text for question in questions]
        drawn = captions[:: max(1, len(captions) // max(1, options.pictures))][: options.pictures]
        record: dict[str, Any] = {
            "captions": len(captions),
            "pictures": drawn,
            "machine": machine(),
            "versions": versions(),
            "formats": {},
        }
        found: dict[str, dict[str, Any]] = record["formats"]
        found |= _measured_before(options.out, record)
        reference = SanaReference(checkpoint)
        exact, pictures = _embeddings(reference, captions), _draw(reference, drawn)
        for word, formats in wanted.items():
            if word not in found:
                reference = SanaReference(checkpoint)
                quantize(reference, formats, plan_for(word, checkpoint, Store(options.cache)))
                numbers: dict[str, Any] = measure(exact, _embeddings(reference, captions))
                likenesses = likeness(pictures, _draw(reference, drawn)) if drawn else []
                numbers |= {f"picture_{name}": [getattr(each, name) for each in likenesses] for name in ("psnr_db", "lpips")}
                found[word] = numbers
                if options.out is not None:
                    write_result(options.out, record)
            print(f"{word}: {_shown(found[word])}", flush=True)
    except (SanaError, FileNotFoundError) as error:
        print(f"text_weights: {error}", file=sys.stderr)
        return 1
    return 0


def _shown(numbers: Mapping[str, Any]) -> str:
    shown = f"embeddings {numbers['embedding_rms']:.2%} off, cosine {numbers['embedding_cosine']:.5f}"
    if numbers["picture_psnr_db"]:
        psnr, lpips = (float(np.mean(numbers[f"picture_{name}"])) for name in ("psnr_db", "lpips"))
        shown += f"; {len(numbers['picture_lpips'])} pictures: PSNR {psnr:.1f} dB, LPIPS {lpips:.4f}"
    return shown


def _measured_before(path: Path | None, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Formats in a file of a run that differs in nothing else."""
    if path is None or not path.is_file():
        return {}
    there: dict[str, Any] = json.loads(path.read_bytes())
    before: dict[str, dict[str, Any]] = there.pop("formats", {})
    return before if there == {name: value for name, value in record.items() if name != "formats"} else {}


if __name__ == "__main__":
    raise SystemExit(main())
