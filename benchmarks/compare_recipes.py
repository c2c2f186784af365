"""fp16, our recipes and other tools' own for the same formats, in one run: the same layers, captions, seeds and calibration.

    python benchmarks/compare_recipes.py --captions 10 --seeds 2 --peer-captions 2 --peer-seeds 1 \
        --out benchmarks/results/quant_recipes_sana_tiny.json --page out/recipes.html --record

All are simulated in PyTorch as a bundle computes them on a GPU (benchmarks/recipe_pictures.py), the text encoder and the text
projection with the recipe's weights. fp16 is compared with the fp32 reference, all else with fp16: pictures of the same caption and
seed. --captions: of each of five kinds of scenes that training never saw. Every picture is an entry of the cache, so a run that was
killed goes on where it was, and one with more captions draws only what is new; --share 0/2 and 1/2 let two processes draw half
each, and a last run without it says what they found. Intervals are 95 %, by a bootstrap over captions and their seeds; "better" and
"worse" are said where the interval of the difference of pairs leaves 0 out. --record appends quant_FORMAT_scene_points_lost,
_psnr_db and _lpips of our own, and fp16's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.figures import record
from benchmarks.peer_recipes import FORMATS, FP16, FP32, Candidate, Unavailable, candidates, unquantized
from benchmarks.quality import as_tensor, held_out, judged
from benchmarks.recipe_pictures import Job, Key, draw_all
from benchmarks.recipes_page import page
from engines.errors import SanaError
from engines.store import Store
from export.fingerprint import versions
from export.metrics.pictures import estimate, likeness
from export.progress import Progress
from sana_ref.checkpoint import load
from sana_ref.pipeline import SanaReference
from train.tiny import recogniser
from train.tiny.evaluate import Question

__all__ = ["Result", "main", "rounds", "seeds_of", "sentence"]

METRICS = ("psnr_db", "ssim", "lpips", "points_lost")
BETTER = {"psnr_db": 1, "ssim": 1, "lpips": -1, "points_lost": -1}  # sign of a difference that is an improvement
SEEDS_A_CAPTION, SEEDS_A_KIND = 100, 1_000_000  # so that a picture's seed does not depend on how many are asked for
FIGURES = (("points_lost", "scene_points_lost", "points of 100"), ("psnr_db", "psnr_db", "dB"), ("lpips", "lpips", "LPIPS"))
Seeded = tuple[Question, Sequence[int]]  # a caption and the seeds of its pictures
Pictures = Mapping[Key, Image.Image]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one candidate. values: METRICS, (captions, seeds) each, against pictures of the same captions and seeds.

    A peer may have fewer captions and seeds than ours: the places of its captions among all are `places`.
    """

    candidate: Candidate
    places: Sequence[int]
    values: Mapping[str, NDArray[np.float64]]

    def summary(self) -> dict[str, Any]:
        means = {name: estimate(values).model_dump() for name, values in self.values.items()}
        return {
            "tool": self.candidate.tool,
            "format": self.candidate.format,
            "size_ratio": self.candidate.size_ratio,
            "text_weights": dict(self.candidate.weights),
            "captions": len(self.places),
            "pictures": int(self.values["lpips"].size),
            **means,
        }

    def beside(self, other: Result, name: str) -> NDArray[np.float64]:
        """Its values of what the other has drawn too."""
        rows = [self.places.index(place) for place in other.places]
        return self.values[name][rows, : other.values[name].shape[1]]


def sentence(ours: Result, peers: Sequence[Result], missing: Sequence[Unavailable] = ()) -> str:
    """Where ours is better, worse, or cannot be told apart, of one format."""
    parts = []
    for peer in peers:
        said: dict[str, list[str]] = {}
        for name in ("lpips", "psnr_db", "points_lost"):
            gap = estimate((ours.beside(peer, name) - peer.values[name]) * BETTER[name])
            word = "better" if gap.low > 0 else "worse" if gap.high < 0 else "not told apart"
            said.setdefault(word, []).append(name)
        words = "; ".join(f"{word} in {', '.join(names)}" for word, names in said.items())
        parts.append(
            f"{ours.candidate.name} (size {ours.candidate.size_ratio:.3f}) beside {peer.candidate.name} "
            f"(size {peer.candidate.size_ratio:.3f}), {peer.values['lpips'].size} pictures: {words}."
        )
    parts += [f"{each.name} was not measured: {each.why}." for each in missing]
    return " ".join(parts)


def seeds_of(questions: Sequence[Question], seeds: int) -> list[range]:
    """Of each question's pictures: the same however many captions and seeds are asked for."""
    seen: Counter[int] = Counter()
    found = []
    for question in questions:
        kind = question.scene.kind
        first = kind * SEEDS_A_KIND + seen[kind] * SEEDS_A_CAPTION
        found.append(range(first, first + seeds))
        seen[kind] += 1
    return found


def rounds(who: Sequence[Candidate], asked: Sequence[Seeded]) -> list[Job]:
    """All pictures, in an order that leaves a run that is stopped with the same ones of every candidate and kind of scene."""
    seen: Counter[int] = Counter()
    jobs = []
    for question, seeds in asked:
        number = seen[question.scene.kind]
        seen[question.scene.kind] += 1
        jobs += [
            ((turn, number, place), Job(each, question.text, seed))
            for turn, seed in enumerate(seeds)
            for place, each in enumerate(who)
        ]
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def _of(candidate: Candidate, asked: Sequence[Seeded], pictures: Pictures) -> list[Image.Image]:
    return [pictures[candidate.name, question.text, seed] for question, seeds in asked for seed in seeds]


class _Measure:
    """Compares what candidates drew; the recogniser sees each picture once."""

    def __init__(self, judge: Path, pictures: Pictures) -> None:
        self.eye, _ = recogniser.load(judge / "recogniser")
        self.pictures = pictures

    def right(self, candidate: Candidate, asked: Sequence[Seeded]) -> NDArray[np.float64]:
        """(captions, seeds), 100 for a picture that is right and 0 for one that is not."""
        each = [question for question, seeds in asked for _ in seeds]
        verdicts = judged(self.eye, as_tensor(_of(candidate, asked, self.pictures)), each)
        return np.array([100.0 * (one.right and one.colour) for one in verdicts]).reshape(len(asked), -1)

    def result(self, candidate: Candidate, beside: Candidate, asked: Sequence[Seeded], places: Sequence[int]) -> Result:
        alike = likeness(*(_of(each, asked, self.pictures) for each in (beside, candidate)))
        values = {name: np.array([getattr(each, name) for each in alike]).reshape(len(asked), -1) for name in METRICS[:3]}
        lost = self.right(beside, asked) - self.right(candidate, asked)
        return Result(candidate=candidate, places=places, values={**values, "points_lost": lost})


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Draw, measure, write; of a share, draw alone. Raises SanaError, FileNotFoundError."""
    checkpoint, store, progress = load(options.model), Store(options.cache), Progress()
    found, missing = candidates(SanaReference(checkpoint), options.formats, options.recipe_key, store=store, progress=progress)
    exact, half = unquantized(FP32), unquantized(FP16)
    own = [next(each for each in found if each.format == kind and each.tool == "sana") for kind in options.formats]
    peers = [each for each in found if each not in own]
    questions = held_out(options.judge, options.captions)
    asked = list(zip(questions, seeds_of(questions, options.seeds), strict=True))
    numbers: Counter[int] = Counter()
    places = []
    for place, question in enumerate(questions):
        if numbers[question.scene.kind] < options.peer_captions:
            places.append(place)
        numbers[question.scene.kind] += 1
    fewer = [(asked[place][0], asked[place][1][: options.peer_seeds]) for place in places]
    jobs = [*rounds([half, *own], asked), *rounds([exact, *peers], fewer)]
    if options.share is not None:
        turn, of = options.share
        draw_all(checkpoint, jobs[turn::of], store, progress)
        return None
    pictures = draw_all(checkpoint, jobs, store, progress)
    with progress.stage("comparing"):
        measure = _Measure(options.judge, pictures)
        everywhere = range(len(asked))
        results = [measure.result(half, exact, fewer, places), *(measure.result(each, half, asked, everywhere) for each in own)]
        results += [measure.result(each, half, fewer, places) for each in peers]
        scores = {each.name: estimate(measure.right(each, asked)).model_dump() for each in (half, *own)}
        scores[FP32] = estimate(measure.right(exact, fewer)).model_dump()
    sentences = {}
    for kind in options.formats:
        of_kind = [each for each in results if each.candidate.format == kind]
        ours = [each for each in of_kind if each.candidate.tool == "sana"]
        others = [each for each in of_kind if each.candidate.tool != "sana"]
        absent = [each for each in missing if each.format == kind]
        sentences[kind] = " ".join(sentence(each, others, absent if each is ours[-1] else ()) for each in ours)
    summary = {
        "what": "pictures of pipelines, simulated in PyTorch: fp16's against the fp32 reference's, all else against fp16's",
        "model": checkpoint.digest,
        "captions": len(questions),
        "seeds": options.seeds,
        "scene_scores": scores,
        "recipe_keys": options.recipe_key,
        "recipes": {each.candidate.name: each.summary() for each in results},
        "not_measured": {each.name: each.why for each in missing},
        "sentences": sentences,
        "versions": versions(),
        "pairs": {each.candidate.name: {name: each.values[name].tolist() for name in METRICS} for each in results},
    }
    _write(options.out, json.dumps(summary, indent=1) + "\n")
    _write(options.page, page(summary, [(question.text, seeds) for question, seeds in asked], pictures))
    for name, each in summary["recipes"].items():
        means = ", ".join(f"{metric} {each[metric]['mean']:.4g}" for metric in METRICS)
        print(f"{name:<28} size {each['size_ratio']:.3f}, {each['pictures']} pictures, {means}")
    print("\n".join(sentences.values()))
    if options.record:
        _record(results)
    return summary


def _record(results: Sequence[Result]) -> None:
    """fp16's and ours, with the others of the format as peers."""
    for own in results:
        kind = own.candidate.format
        if own.candidate.name not in (FP16, f"sana {kind}"):
            continue
        others = [each for each in results if each.candidate.format == kind and each is not own]
        text = ", ".join(f"{name.replace('_', ' ')} {form}" for name, form in own.candidate.weights.items())
        for name, figure, unit in FIGURES:
            mean = estimate(own.values[name])
            peer = {each.candidate.name: float(each.values[name].mean()) for each in others}
            against = FP32 if kind == FP16 else FP16
            note = f"{mean.text(4)}; {len(own.places)} captions kept out, {own.values[name].shape[1]} seeds each; simulated in "
            note += f"PyTorch, against {against}'s pictures of the same seed" + (f"; {text}" if text else "")
            if others:
                note += f"; peers: {others[0].values[name].size} of these pictures, the same text weights, of which ours has "
                note += f"{own.beside(others[0], name).mean():.4f}"
            print(json.dumps(record(f"quant_{kind}_{figure}", mean.mean, unit, peer=peer, note=note)))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _share(word: str) -> tuple[int, int]:
    turn, _, of = word.partition("/")
    if not (turn.isdecimal() and of.isdecimal() and int(turn) < int(of)):
        raise argparse.ArgumentTypeError(f"got {word!r}; expected a number and how many, as in 0/2 and 1/2")
    return int(turn), int(of)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/sana-tiny")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of int8, fp8, nvfp4")
    parser.add_argument("--captions", type=int, default=10, metavar="N", help="of each of five kinds of scenes; default 10")
    parser.add_argument("--seeds", type=int, default=2, metavar="K", help="pictures of each caption, at most 100; default 2")
    parser.add_argument(
        "--peer-captions", type=int, default=4, metavar="N", help="of each kind, of fp32 and of other recipes; default 4"
    )
    parser.add_argument("--peer-seeds", type=int, default=1, metavar="K", help="of fp32 and of other recipes; default 1")
    parser.add_argument("--share", type=_share, metavar="I/N", help="draw this part of the pictures, and no more")
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
    for flag, value, most in (
        ("captions", options.captions, SEEDS_A_KIND // SEEDS_A_CAPTION),
        ("seeds", options.seeds, SEEDS_A_CAPTION),
        ("peer-captions", options.peer_captions, options.captions),
        ("peer-seeds", options.peer_seeds, options.seeds),
    ):
        if not 1 <= value <= most:
            parser.error(f"--{flag}: got {value}; expected 1 to {most}")
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
