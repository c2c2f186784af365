"""What narrow weights of the text encoder and the text projection cost: embeddings and pictures, against the fp32 reference's.

    python benchmarks/text_weights.py --model models/sana-tiny --formats int8:int8,fp8:fp8,int4:int8 --pictures 4 \
        --out benchmarks/results/text_weights_sana_tiny.json

A format is text encoder:text projection, `none` for 16 bits; int8/int4:int8 has the text encoder's table of tokens in int4, and
int8/host:int8 in the component's 16 bits on the host. All else is the fp32 reference, so their cost alone is measured.
Embeddings are of captions that training never saw; the pictures are of the first of them, with seeds from 0 on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.figures import machine, versions
from benchmarks.quality import held_out
from engines.errors import SanaError, SpecError
from engines.spec import nearest
from export.metrics.pictures import likeness
from export.weight_only import Weights
from sana_ref.checkpoint import load
from sana_ref.components import TOKEN_TABLE
from sana_ref.pipeline import SanaReference
from sana_ref.text_projection import is_text_parameter
from sana_ref.weight_only import HOST, WEIGHT_FORMATS, TableFormat, TextPart, WeightFormat, formats_of, pack_weight

__all__ = ["main", "parse_formats", "quantize"]


def parse_formats(word: str) -> dict[TextPart, TableFormat]:
    """Raises SpecError."""
    encoder, colon, projection = word.partition(":")
    encoder, slash, table = encoder.partition("/")
    if not colon:
        raise SpecError(f"formats: got {word!r}; expected two, as in int4:int8: of the text encoder and of the text projection.")
    asked: list[tuple[TextPart, str]] = [("text_encoder", encoder), ("text_projection", projection)]
    if slash:
        asked.insert(1, ("text_encoder_table", table))
    found: dict[TextPart, TableFormat] = {}
    for name, part in asked:
        valid = [*WEIGHT_FORMATS, HOST] if name == "text_encoder_table" else WEIGHT_FORMATS
        if part not in (*valid, "none"):
            raise SpecError(f"formats: got {part!r} in {word!r}; {nearest(part, [*valid, 'none'])}.")
        kind = next((each for each in valid if each == part), None)
        if kind is not None:
            found[name] = kind
    return found


def quantize(reference: SanaReference, weights: Weights) -> None:
    """Give the reference, in place, the weights that a bundle of these formats computes with."""
    transformer = reference.text_projection.transformer
    encoder, table, projection = (weights.get(part) for part in get_args(TextPart))
    assert encoder != HOST != projection
    of_text = {name: kind for name, kind in formats_of(transformer, projection).items() if is_text_parameter(name)}
    if table == HOST:
        stored = reference.text_encoder.get_parameter(TOKEN_TABLE)
        with torch.no_grad():
            stored.copy_(stored.bfloat16())  # as the file has it
    _quantize(reference.text_encoder, formats_of(reference.text_encoder, encoder, table), torch.bfloat16)
    _quantize(transformer, of_text, torch.float16)


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
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the numbers there")
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
        reference = SanaReference(checkpoint)
        exact, pictures = _embeddings(reference, captions), _draw(reference, drawn)
        found: dict[str, dict[str, Any]] = {}
        for word, formats in wanted.items():
            reference = SanaReference(checkpoint)
            quantize(reference, formats)
            numbers: dict[str, Any] = measure(exact, _embeddings(reference, captions))
            likenesses = likeness(pictures, _draw(reference, drawn)) if drawn else []
            numbers |= {f"picture_{name}": [getattr(each, name) for each in likenesses] for name in ("psnr_db", "lpips")}
            found[word] = numbers
            shown = f"embeddings {numbers['embedding_rms']:.2%} off, cosine {numbers['embedding_cosine']:.5f}"
            if drawn:
                psnr, lpips = (float(np.mean(numbers[f"picture_{name}"])) for name in ("psnr_db", "lpips"))
                shown += f"; {len(drawn)} pictures: PSNR {psnr:.1f} dB, LPIPS {lpips:.4f}"
            print(f"{word}: {shown}", flush=True)
    except (SanaError, FileNotFoundError) as error:
        print(f"text_weights: {error}", file=sys.stderr)
        return 1
    if options.out is not None:
        record = {"captions": len(captions), "pictures": drawn, "machine": machine(), "versions": versions(), "formats": found}
        options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
