"""How well pictures show what their captions say, on combinations that training never saw, judged by the recogniser."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
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


def unit(pictures: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 pictures as fp32, -1 to 1, on `device`; others as they are."""
    pictures = pictures.to(device)
    return pictures.float() / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures


@torch.no_grad()
def judge(recogniser: Recogniser, pictures: Tensor, questions: list[Question]) -> list[Verdict]:
    """One verdict a picture. All questions are of one kind. pictures: (n, 3, H, W), uint8, or fp32 in -1 to 1."""
    kind, device = questions[0].scene.kind, recogniser.head.weight.device
    parts = pictures.split(64)

    def read(place: tuple[float, float] | None, which: int) -> list[int]:
        seen = (unit(part, device) for part in parts)
        answers = [recogniser(part if place is None else cut(part, place))[which].argmax(1).cpu() for part in seen]
        return [int(answer) for answer in torch.cat(answers)]

    guesses = [read(place, 0) for place in ([None] if kind == SINGLE else PLACES[kind])]
    verdicts = []
    for question, colour, *guess in zip(questions, read(None, 1), *guesses, strict=True):
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
    painter: Painter, recogniser: Recogniser, names: list[Names], *, num_single: int = 500, num_other: int = 250
) -> dict[str, Any]:
    """Every kind of scene at 512 px, 20 steps of DPM-Solver++; then a few single objects by guidance, steps and size."""
    guidance = 4.5
    report: dict[str, Any] = {"guidance": guidance, "steps": 20}
    for kind in (SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE):
        questions = held_out_questions(kind, num_single if kind == SINGLE else num_other, names)
        pictures = painter.draw([q.text for q in questions], guidance=guidance, seed=kind)
        report[KIND_NAMES[kind]] = summary(questions, judge(recogniser, pictures, questions))

    questions = held_out_questions(SINGLE, max(2, num_other // 3), names, seed=1)
    texts = [q.text for q in questions]

    def found(**how: Any) -> dict[str, Any]:
        """Of the square in the middle, where the object is."""
        pictures = painter.draw(texts, seed=7, **({"guidance": guidance} | how))
        height, width = pictures.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return summary(questions, judge(recogniser, pictures[:, :, top : top + side, left : left + side], questions))

    report["correct_by_guidance"] = {str(scale): found(guidance=scale)["correct"] for scale in (1.0, 2.0, 6.0)}
    report["correct_by_steps"] = {str(steps): found(steps=steps)["correct"] for steps in (10, 40)}
    sizes = ((640, 384), (384, 640))
    report["correct_by_size"] = {f"{width}x{height}": found(width=width, height=height)["correct"] for width, height in sizes}
    return report


def grid_captions(names: list[Names], num: int) -> list[str]:
    """A mixture for the picture grid: English, held-out combinations of every kind, no two alike."""
    kinds = [SINGLE, SINGLE, SINGLE, SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE]
    rng = np.random.default_rng(5)
    questions = {kind: iter(held_out_questions(kind, num, names, seed=3)) for kind in set(kinds)}
    scenes = [next(questions[kinds[index % len(kinds)]]).scene for index in range(num)]
    return [caption(scene, names, rng, language="en", template=0) for scene in scenes]
