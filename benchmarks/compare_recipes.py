"""Our recipes beside other tools' own for the same format, in one run: the same layers, captions, seeds and calibration.

    python benchmarks/compare_recipes.py --captions 20 --out benchmarks/results/quant_recipes_sana_tiny.json --page out/recipes.html

All are simulated in PyTorch on the fp32 reference (benchmarks/peer_recipes.py says how), and compared with its pictures.
--captions: of each of five kinds of scenes that training never saw. Every picture is an entry of the cache, so a run that was
killed goes on where it was, and one with more captions draws only what is new. Intervals are 95 %; "better" and "worse" are said
where the interval of the difference of pairs leaves 0 out. --record appends quant_FORMAT_scene_points_lost, _psnr_db and _lpips
of our own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.figures import record
from benchmarks.peer_recipes import FORMATS, Candidate, Unavailable, candidates
from benchmarks.quality import as_tensor, held_out, judged
from benchmarks.recipes_page import page
from engines.errors import SanaError
from engines.store import Store, digest_of
from export.fingerprint import code, versions
from export.metrics.pictures import estimate, likeness
from export.progress import Pace, Progress
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference
from train.tiny import recogniser
from train.tiny.evaluate import Question

__all__ = ["Result", "main", "sentence"]

METRICS = ("psnr_db", "ssim", "lpips", "points_lost")
BETTER = {"psnr_db": 1, "ssim": 1, "lpips": -1, "points_lost": -1}  # sign of a difference that is an improvement
SOURCES = ("sana_ref/*.py", "runtime/noise.py", "runtime/schedule.py", "runtime/prompt.py", "benchmarks/peer_recipes.py")
SEEDS_A_KIND = 10_000  # so that a caption's seed does not depend on how many are asked for


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one candidate. values: METRICS, (captions,) each, against the fp32 reference's picture of the same caption and seed."""

    candidate: Candidate
    values: Mapping[str, NDArray[np.float64]]

    def summary(self) -> dict[str, Any]:
        means = {name: estimate(values[:, None]).model_dump() for name, values in self.values.items()}
        return {"tool": self.candidate.tool, "format": self.candidate.format, "size_ratio": self.candidate.size_ratio, **means}


def sentence(ours: Result, peers: Sequence[Result], missing: Sequence[Unavailable] = ()) -> str:
    """Where ours is better, worse, or cannot be told apart, of one format."""
    parts = []
    for peer in peers:
        said: dict[str, list[str]] = {}
        for name in ("lpips", "psnr_db", "points_lost"):
            gap = estimate(((ours.values[name] - peer.values[name]) * BETTER[name])[:, None])
            word = "better" if gap.low > 0 else "worse" if gap.high < 0 else "not told apart"
            said.setdefault(word, []).append(name)
        words = "; ".join(f"{word} in {', '.join(names)}" for word, names in said.items())
        parts.append(
            f"{ours.candidate.name} (size {ours.candidate.size_ratio:.3f}) beside {peer.candidate.name} "
            f"(size {peer.candidate.size_ratio:.3f}): {words}."
        )
    parts += [f"{each.name} was not measured: {each.why}." for each in missing]
    return " ".join(parts)


def seeds_of(questions: Sequence[Question]) -> list[int]:
    """One a question: the same however many captions of each kind are asked for."""
    seen: dict[int, int] = {}
    found = []
    for question in questions:
        kind = question.scene.kind
        found.append(kind * SEEDS_A_KIND + seen.get(kind, 0))
        seen[kind] = seen.get(kind, 0) + 1
    return found


def drawn(
    reference: SanaReference, candidate: Candidate | None, questions: Sequence[Question], store: Store, progress: Progress
) -> list[Image.Image]:
    """A picture of each question, by the candidate; None: by the fp32 reference itself."""
    key = {
        "stage": "picture of a recipe",
        "checkpoint": reference.checkpoint.digest,
        "candidate": None if candidate is None else candidate.digest,
        "code": code(SOURCES),
        "versions": versions(),
    }
    pictures = []
    with progress.stage(f"pictures: {'fp32' if candidate is None else candidate.name}"):
        pace = Pace(progress, "pictures")
        for number, (question, seed) in enumerate(zip(questions, seeds_of(questions), strict=True), 1):

            def make(folder: Path, text: str = question.text, seed: int = seed, left: int = len(questions) - number) -> None:
                with pace.piece(left):
                    if candidate is None:
                        picture = reference.generate(text, seed=seed)[0]
                    else:
                        with candidate.products():
                            picture = reference.generate(text, seed=seed)[0]
                    picture.save(folder / "picture.png")

            folder = store.get_or_make(digest_of({**key, "caption": question.text, "seed": seed}), make)
            with Image.open(folder / "picture.png") as file:
                pictures.append(file.convert("RGB"))
    return pictures


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw, measure, write. Raises SanaError, FileNotFoundError."""
    checkpoint, store, progress = load(options.model), Store(options.cache), Progress()
    reference = SanaReference(checkpoint)
    found, missing = candidates(reference, options.formats, options.recipe_key, store=store, progress=progress)
    eye, _ = recogniser.load(options.judge / "recogniser")
    questions = held_out(options.judge, options.captions)

    def right(pictures: list[Image.Image]) -> NDArray[np.float64]:
        return np.array([100.0 * (each.right and each.colour) for each in judged(eye, as_tensor(pictures), questions)])

    exact = drawn(reference, None, questions, store, progress)
    score, results, shown = right(exact), [], {}
    for candidate in found:
        got = drawn(reference, candidate, questions, store, progress)
        alike = likeness(exact, got)
        values = {name: np.array([getattr(each, name) for each in alike]) for name in METRICS[:3]}
        results.append(Result(candidate=candidate, values={**values, "points_lost": score - right(got)}))
        shown[candidate.name] = got
    sentences = {}
    for kind in options.formats:
        own = [each for each in results if each.candidate.format == kind and each.candidate.tool == "sana"]
        peers = [each for each in results if each.candidate.format == kind and each.candidate.tool != "sana"]
        absent = [each for each in missing if each.format == kind]
        sentences[kind] = " ".join(sentence(each, peers, absent if each is own[-1] else ()) for each in own)
    summary = {
        "what": "pictures of quantized denoisers, simulated in PyTorch, against the fp32 reference's of the same caption and seed",
        "model": checkpoint.digest,
        "captions": len(questions),
        "fp32_scene_score": estimate(score[:, None]).model_dump(),
        "recipe_keys": options.recipe_key,
        "recipes": {each.candidate.name: each.summary() for each in results},
        "not_measured": {each.name: each.why for each in missing},
        "sentences": sentences,
        "versions": versions(),
        "pairs": {each.candidate.name: {name: each.values[name].tolist() for name in METRICS} for each in results},
    }
    _write(options.out, json.dumps(summary, indent=1) + "\n")
    texts = [question.text for question in questions]
    _write(options.page, page(summary, texts, {"fp32": exact, **shown}))
    for name, each in summary["recipes"].items():
        means = ", ".join(f"{metric} {each[metric]['mean']:.4g}" for metric in METRICS)
        print(f"{name:<28} size {each['size_ratio']:.3f}, {means}")
    print("\n".join(sentences.values()))
    if options.record:
        _record(results, len(questions))
    return summary


def _record(results: Sequence[Result], captions: int) -> None:
    """Ours, with the others of the format as peers."""
    for kind in FORMATS:
        of_kind = [each for each in results if each.candidate.format == kind]
        for own in (each for each in of_kind if each.candidate.name == f"sana {kind}"):
            for name, figure, unit in (
                ("points_lost", "scene_points_lost", "points of 100"),
                ("psnr_db", "psnr_db", "dB"),
                ("lpips", "lpips", "LPIPS"),
            ):
                mean = estimate(own.values[name][:, None])
                peer = {each.candidate.name: float(each.values[name].mean()) for each in of_kind if each is not own}
                note = f"{mean.text(4)}; {captions} captions kept out, 1 seed each; simulated in PyTorch, against fp32's pictures"
                print(json.dumps(record(f"quant_{kind}_{figure}", mean.mean, unit, peer=peer, note=note)))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/sana-tiny")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of int8, fp8, nvfp4")
    parser.add_argument("--captions", type=int, default=20, metavar="N", help="of each of five kinds of scenes; default 20")
    parser.add_argument("--recipe-key", action="append", default=[], metavar="KEY=VALUE", help="over each of our recipes")
    parser.add_argument("--judge", type=Path, default=Path("models/sana-tiny"), help="folder of the recogniser and the captions")
    parser.add_argument("--cache", type=Path, help="where pictures and calibrations are kept")
    parser.add_argument("--out", type=Path, default=Path("out/recipes.json"))
    parser.add_argument("--page", type=Path, default=Path("out/recipes.html"))
    parser.add_argument("--record", action="store_true", help="append quant_FORMAT_… to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    options.formats = options.formats.split(",")
    if wrong := set(options.formats) - set(FORMATS):
        parser.error(f"--formats: got {', '.join(sorted(wrong))}; expected some of {', '.join(FORMATS)}")
    if options.captions < 1:
        parser.error(f"--captions: got {options.captions}; expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if something cannot be used; 130 after Ctrl-C: what was drawn stays in the cache."""
    options = parse(arguments)
    try:
        run(options)
    except (SanaError, FileNotFoundError) as error:
        print(f"compare_recipes: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare_recipes: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
