"""How well pictures show what their captions say, on combinations that training never saw, judged by the recogniser."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.tiny.captions import (
    ABOVE_BELOW,
    KIND_NAMES,
    LANGUAGES,
    LEFT_RIGHT,
    SINGLE,
    TEMPLATES,
    THREE,
    TWO,
    Names,
    Scene,
    caption,
)
from train.tiny.recogniser import Recogniser
from train.tiny.sampling import Painter
from train.tiny.scenes import FAR, NEAR, HeldOut

CROP = 0.52  # side of the square that is cut around an object of several, as a fraction of the short side
PLACES = {
    LEFT_RIGHT: ((NEAR, 0.5), (FAR, 0.5)),
    ABOVE_BELOW: ((0.5, NEAR), (0.5, FAR)),
    TWO: ((NEAR, 0.5), (FAR, 0.5)),
    THREE: ((0.5, NEAR), (NEAR, FAR), (FAR, FAR)),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A caption and what its picture must show."""

    text: str
    language: str
    scene: Scene


@dataclass(frozen=True, slots=True)
class Verdict:
    """right: every object, each in its place. colour: the background. guess: the classes that were seen, place by place."""

    right: bool
    colour: bool
    guess: tuple[int, ...]


def held_out_questions(kind: int, num: int, names: list[Names], *, seed: int = 0) -> list[Question]:
    """Captions of scenes that training never showed: an emoji on a colour for one object or several of the same, two emoji
    together for pairs. Languages in the grammar's shares; every caption names its colour.
    """
    classes = [entry["en"][0] for entry in names]
    held = HeldOut.of(classes)
    rng = np.random.Generator(np.random.Philox([seed, kind]))
    questions: list[Question] = []
    combinations = np.argwhere(held.pair if kind in (LEFT_RIGHT, ABOVE_BELOW) else held.colour)
    order = np.concatenate([rng.permutation(len(combinations)) for _ in range(1 + num // len(combinations))])[:num]
    for first, other in combinations[order]:
        if kind in (LEFT_RIGHT, ABOVE_BELOW):
            seen = np.flatnonzero(~(held.colour[first] | held.colour[other]))
            scene = Scene(kind, int(first), int(other), int(rng.choice(seen)))
        else:
            scene = Scene(kind, int(first), -1, int(other))
        language = str(rng.choice(list(LANGUAGES), p=list(LANGUAGES.values())))
        coloured = [i for i, text in enumerate(TEMPLATES[language][kind]) if "{c}" in text or "{d}" in text]
        text = caption(scene, names, rng, language=language, template=int(rng.choice(coloured)))
        questions.append(Question(text, language, scene))
    return questions


def cut(pictures: Tensor, place: tuple[float, float]) -> Tensor:
    """The square around a place (fractions of width and height), (n, 3, s, s); clipped to the picture by shifting it inside."""
    height, width = pictures.shape[2:]
    side = round(CROP * min(height, width))
    left = min(max(0, round(place[0] * width - side / 2)), width - side)
    top = min(max(0, round(place[1] * height - side / 2)), height - side)
    return pictures[:, :, top : top + side, left : left + side]


@torch.no_grad()
def judge(recogniser: Recogniser, pictures: Tensor, questions: list[Question]) -> list[Verdict]:
    """One verdict a picture. All questions are of one kind."""
    kind = questions[0].scene.kind
    seen = [pictures] if kind == SINGLE else [cut(pictures, place) for place in PLACES[kind]]
    guesses = [torch.cat([recogniser(part)[0].argmax(1).cpu() for part in each.split(256)]).tolist() for each in seen]
    colours = torch.cat([recogniser(part)[1].argmax(1).cpu() for part in pictures.split(256)]).tolist()
    verdicts = []
    for question, colour, *guess in zip(questions, colours, *guesses, strict=True):
        scene = question.scene
        wanted = [scene.first, scene.second] if scene.second >= 0 else [scene.first] * len(guess)
        verdicts.append(Verdict(right=guess == wanted, colour=colour == scene.colour, guess=tuple(guess)))
    return verdicts


def summary(questions: list[Question], verdicts: list[Verdict]) -> dict[str, Any]:
    """`correct`: share with every object right and in its place; `colour`: with the right background; by language too."""
    by_language: dict[str, list[bool]] = {}
    missed: Counter[str] = Counter()
    for question, verdict in zip(questions, verdicts, strict=True):
        by_language.setdefault(question.language, []).append(verdict.right)
        if question.scene.kind == SINGLE and not verdict.right:
            missed[f"{question.scene.first}->{verdict.guess[0]}"] += 1
    return {
        "questions": len(questions),
        "correct": fmean(verdict.right for verdict in verdicts),
        "colour": fmean(verdict.colour for verdict in verdicts),
        "both": fmean(verdict.right and verdict.colour for verdict in verdicts),
        "by_language": {language: round(fmean(by_language[language]), 4) for language in LANGUAGES if language in by_language},
        "missed": dict(missed.most_common(30)),
    }


def evaluate(
    painter: Painter, recogniser: Recogniser, names: list[Names], *, num_single: int = 1000, num_other: int = 300
) -> dict[str, Any]:
    """Every kind of scene at 256 px, 20 steps of DPM-Solver++; then single objects by guidance, steps and size."""
    guidance = 4.5
    report: dict[str, Any] = {"guidance": guidance, "steps": 20}
    for kind in (SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE):
        questions = held_out_questions(kind, num_single if kind == SINGLE else num_other, names)
        pictures = painter.draw([q.text for q in questions], guidance=guidance, seed=kind)
        report[KIND_NAMES[kind]] = summary(questions, judge(recogniser, pictures, questions))

    questions = held_out_questions(SINGLE, num_other, names, seed=1)
    texts = [q.text for q in questions]

    def found(pictures: Tensor) -> dict[str, Any]:
        return summary(questions, judge(recogniser, pictures, questions))

    sweep = {str(scale): found(painter.draw(texts, guidance=scale, seed=7)) for scale in (1.0, 2.0, 3.0, 4.5, 6.0)}
    report["sweep_guidance_correct_colour"] = {
        scale: [round(result["correct"], 4), round(result["colour"], 4)] for scale, result in sweep.items()
    }
    for steps in (10, 40):
        report[f"correct_{steps}_steps"] = found(painter.draw(texts, guidance=guidance, seed=7, steps=steps))["correct"]
    report["correct_by_size"] = {}
    for width, height in ((320, 192), (192, 320), (320, 320)):
        pictures = painter.draw(texts, guidance=guidance, seed=7, width=width, height=height)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        square = pictures[:, :, top : top + side, left : left + side]
        report["correct_by_size"][f"{width}x{height}"] = found(square)["correct"]
    return report


def grid(pictures: Tensor, captions: list[str], path: Path, *, columns: int = 8, side: int = 160) -> None:
    """A PNG of pictures with their captions beneath, for looking at. Pillow's font lacks some scripts and shows boxes for them."""
    height = round(side * pictures.shape[2] / pictures.shape[3])
    cell = height + 34
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * side, rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pixels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, text in enumerate(captions):
        left, top = index % columns * side, index // columns * cell
        sheet.paste(Image.fromarray(pixels[index]).resize((side - 4, height - 4), Image.Resampling.LANCZOS), (left + 2, top + 2))
        for line, part in enumerate(textwrap.wrap(text, 28)[:2]):
            draw.text((left + 3, top + height + 14 * line), part, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def grid_captions(names: list[Names], num: int) -> list[str]:
    """A mixture for the picture grid: English, held-out combinations of every kind, no two alike."""
    kinds = [SINGLE, SINGLE, SINGLE, SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE]
    rng = np.random.default_rng(5)
    questions = {kind: iter(held_out_questions(kind, num, names, seed=3)) for kind in set(kinds)}
    scenes = [next(questions[kinds[index % len(kinds)]]).scene for index in range(num)]
    return [caption(scene, names, rng, language="en", template=0) for scene in scenes]
