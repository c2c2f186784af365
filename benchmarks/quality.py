"""How well a model or a bundle draws what captions say, on combinations that training never saw.

    python benchmarks/quality.py out/sana-tiny --record
    python benchmarks/quality.py models/sana-tiny --captions 20

The same captions, seeds and judge for the PyTorch reference (a model folder), ONNX Runtime and TensorRT (a bundle). The judge is
the recogniser that was trained apart and ships with sana-tiny: it names the likeliest of a closed set of objects, so a score says
nothing of beauty. With --sprites (made by `python -m train.tiny.prepare_sprites`) its own score on real scenes of the same captions
stands beside each score, and the Fréchet distance to those scenes is taken. Writes scores.json and index.html, misses first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from benchmarks.figures import record
from benchmarks.quality_page import page
from benchmarks.scene_score import Score, diversity, frechet_distance, scores
from engines.errors import SanaError
from runtime import SanaEngine
from train.tiny import recogniser
from train.tiny.captions import KIND_NAMES, SINGLE, Scene
from train.tiny.evaluate import Question, Verdict, judge
from train.tiny.scenes import SceneTensors, compose, draw_scenes, palette
from train.tiny.sprites import Sprites, load_sprites

CHUNK = 8  # pictures between two movements of the progress bar
DIVERSITY_CAPTIONS, DIVERSITY_SEEDS = 8, 8
Draw = Callable[[list[str], int], list[Image.Image]]  # captions, seed of the first -> pictures


def held_out(model: Path, num: int) -> list[Question]:
    """The first `num` captions of each kind, or all where there are fewer. Raises FileNotFoundError."""
    kinds = json.loads((model / "held_out_captions.json").read_text(encoding="utf-8"))
    return [
        Question(row["caption"], row["language"], Scene(KIND_NAMES.index(kind), row["first"], row["second"], row["colour"]))
        for kind in KIND_NAMES
        for row in kinds[kind][:num]
    ]


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, H, W) fp32, -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def judged(eye: recogniser.Recogniser, pictures: Tensor, questions: Sequence[Question]) -> list[Verdict]:
    """One verdict a picture, in order; `judge` takes one kind at a time."""
    verdicts: dict[int, Verdict] = {}
    for kind in range(len(KIND_NAMES)):
        rows = [i for i, question in enumerate(questions) if question.scene.kind == kind]
        if rows:
            verdicts |= zip(rows, judge(eye, pictures[rows], [questions[i] for i in rows]), strict=True)
    return [verdicts[i] for i in range(len(questions))]


def real_scenes(questions: Sequence[Question], sprites: Sprites, side: int, *, seed: int = 0) -> Tensor:
    """Pictures of what the captions say, composed from the sprites as for training. (n, 3, side, side) fp32, -1 to 1."""
    found = torch.empty(len(questions), 3, side, side)
    for kind in range(len(KIND_NAMES)):
        rows = [i for i, question in enumerate(questions) if question.scene.kind == kind]
        if not rows:
            continue
        scenes = draw_scenes(len(rows), seed=seed + kind, num_objects=sprites.num_classes, kind=kind)
        for number, i in enumerate(rows):
            scene = questions[i].scene
            places = int((scenes.objects[number] >= 0).sum())
            scenes.objects[number, :places] = [scene.first, scene.second] if scene.second >= 0 else scene.first
            scenes.colour[number] = scene.colour
        found[rows] = compose(SceneTensors.of(scenes, "cpu"), sprites.rgba, width=side, height=side, colours=palette("cpu"))
    return found


def drawn(draw: Draw, questions: Sequence[Question], seed: int) -> list[Image.Image]:
    """A picture of each caption; the seed of the next is one more."""
    pictures: list[Image.Image] = []
    for start in track(range(0, len(questions), CHUNK), description="drawing", disable=not sys.stderr.isatty()):
        pictures += draw([question.text for question in questions[start : start + CHUNK]], seed + start)
    return pictures


def measure(
    draw: Draw, judge_folder: Path, *, captions: int, seed: int, sprites: Path | None, out: Path, title: str
) -> dict[str, Any]:
    """Draw, judge, write out/scores.json and out/index.html, and return what scores.json holds."""
    eye, classes = recogniser.load(judge_folder / "recogniser")
    questions = held_out(judge_folder, captions)
    pictures = drawn(draw, questions, seed)
    tensors = as_tensor(pictures)
    verdicts = judged(eye, tensors, questions)
    found = scores(questions, verdicts)

    singles = [question.text for question in questions if question.scene.kind == SINGLE][:DIVERSITY_CAPTIONS]
    quiet = not sys.stderr.isatty()
    seeds = [as_tensor(draw([text] * DIVERSITY_SEEDS, seed)) for text in track(singles, description="other seeds", disable=quiet)]
    report: dict[str, Any] = {"title": title, "captions": len(questions), "seed": seed}
    report["diversity"] = diversity(eye, torch.stack(seeds))
    own: dict[str, Score] = {}
    lines = [f"{len(questions)} captions that training never saw. Diversity across seeds {report['diversity']:.4f}."]
    if sprites is None:
        lines.append("Fréchet distance and the judge's own score on real scenes were not taken: they need --sprites.")
    else:
        real = real_scenes(questions, load_sprites(sprites), tensors.shape[-1])
        own = scores(questions, judged(eye, real, questions))
        report["frechet"] = frechet_distance(eye, tensors, real)
        lines.append(f"Fréchet distance to real scenes, in the judge's features: {report['frechet']:.4f}.")
    for name, score in found.items():
        beside = asdict(own[name]) | {"share": own[name].share} if name in own else None
        report[name] = asdict(score) | {"share": score.share, "interval": score.interval, "judge_on_real_scenes": beside}
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "scores.json", json.dumps(report, indent=1) + "\n")
    _write(out / "index.html", page(title, lines, found, own, pictures, questions, verdicts, classes))
    for name, score in found.items():
        print(f"{name:9} {score}" + (f"; the judge on real scenes {100 * own[name].share:.1f} %" if name in own else ""))
    print("\n".join(lines))
    print(f"pictures: {out / 'index.html'}")
    return report


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def painter(source: Path, backend: str, stack: ExitStack) -> tuple[Draw, str]:
    """How to draw with `source`, and what draws. Raises SanaError if it is neither a bundle nor a model."""
    if (source / "manifest.json").is_file():
        engine = stack.enter_context(SanaEngine(source, backend=backend))
        title = f"{engine.manifest.model}, bundle {engine.bundle.digest[:12]}, {engine.backend} on {engine.device}"
        return lambda texts, seed: engine.generate(texts, seed=seed), title
    if not (source / "model_index.json").is_file():
        raise SanaError(f"{source}: got neither a bundle (manifest.json) nor a model (model_index.json); expected one of them.")
    if backend != "auto":
        raise SanaError(f"--backend {backend}: got a model folder, which PyTorch draws; expected a bundle. Build one: sana build")
    from sana_ref.pipeline import SanaReference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = SanaReference(source, device=device)
    return lambda texts, seed: reference.generate(texts, seed=seed), f"{source.name}, PyTorch fp32 on {device}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL_OR_BUNDLE")
    parser.add_argument("--backend", choices=("auto", "tensorrt", "onnxruntime"), default="auto", help="of a bundle")
    parser.add_argument("--judge", type=Path, default=Path("models/sana-tiny"), help="folder of the recogniser and the captions")
    parser.add_argument("--captions", type=int, default=100, metavar="N", help="of each of five kinds of scenes; default 100")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next; default 0")
    parser.add_argument("--sprites", type=Path, help="for real scenes: what `python -m train.tiny.prepare_sprites` made")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder for scores.json and index.html")
    parser.add_argument("--record", action="store_true", help="append tiny_scene_… to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    if options.captions < 1:
        parser.error(f"--captions: got {options.captions}; expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if the source or the judge cannot be used; 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        with ExitStack() as stack:
            draw, title = painter(options.source, options.backend, stack)
            print(title)
            report = measure(
                draw,
                options.judge,
                captions=options.captions,
                seed=options.seed,
                sprites=options.sprites,
                out=options.out,
                title=title,
            )
    except (SanaError, FileNotFoundError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quality: interrupted; nothing was recorded", file=sys.stderr)
        return 130
    if options.record:
        for name, score in ((name, report[name]) for name in report if isinstance(report[name], dict)):
            low, high = score["interval"]
            beside = score["judge_on_real_scenes"]
            own = "not taken" if beside is None else f"{beside['share']:.3f}"
            note = f"{score['right']} of {score['total']} (95 %: {low:.3f} to {high:.3f}); the judge on real scenes: {own}; {title}"
            print(json.dumps(record(f"tiny_scene_{name}", score["share"], "share", note=note)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
