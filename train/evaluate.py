"""How well pictures show what their captions say, on combinations that training never saw, judged by the recogniser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.captions import (
    ABOVE_BELOW,
    COLOUR_NAMES,
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
from train.recogniser import Recogniser
from train.sampling import Painter
from train.scenes import FAR, NEAR, HeldOut

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


def cut(pictures: Tensor, place: tuple[float, float], *, stacked: bool = False) -> Tensor:
    """The square around a place (fractions of width and height), (n, 3, s, s); clipped to the picture by shifting it inside."""
    height, width = pictures.shape[2:]
    side = round(CROP * min(height, width))
    left = min(max(0, round(place[0] * width - side / 2)), width - side)
    top = min(max(0, round(place[1] * height - side / 2)), height - side)
    return pictures[:, :, top : top + side, left : left + side]


@torch.no_grad()
def judge(recogniser: Recogniser, pictures: Tensor, questions: list[Question]) -> dict[str, object]:
    """All questions of one kind. `correct`: every object right and in its place; `colour`: the background; by language too."""
    kind = questions[0].scene.kind
    wanted = [[q.scene.first, q.scene.second if q.scene.second >= 0 else q.scene.first] for q in questions]
    right = torch.ones(len(questions), dtype=torch.bool)
    places: list[tuple[float, float] | None] = [None] if kind == SINGLE else list(PLACES[kind])
    guesses = []
    for index, place in enumerate(places):
        seen = pictures if place is None else cut(pictures, place)
        guess = torch.cat([recogniser(part)[0].argmax(1).cpu() for part in seen.split(256)])
        guesses.append(guess)
        right &= guess == torch.tensor([row[min(index, 1)] for row in wanted])
    colour = torch.cat([recogniser(part)[1].argmax(1).cpu() for part in pictures.split(256)])
    right_colour = colour == torch.tensor([q.scene.colour for q in questions])
    by_language = {
        language: round(right[[q.language == language for q in questions]].float().mean().item(), 4)
        for language in LANGUAGES
        if any(q.language == language for q in questions)
    }
    result: dict[str, object] = {
        "questions": len(questions),
        "correct": right.float().mean().item(),
        "colour": right_colour.float().mean().item(),
        "both": (right & right_colour).float().mean().item(),
        "by_language": by_language,
    }
    if kind == SINGLE:
        missed: dict[str, int] = {}
        for q, hit, guess in zip(questions, right.tolist(), guesses[0].tolist(), strict=True):
            if not hit:
                missed[f"{q.scene.first}->{guess}"] = missed.get(f"{q.scene.first}->{guess}", 0) + 1
        result["missed"] = dict(sorted(missed.items(), key=lambda item: -item[1])[:30])
    return result


def evaluate(
    painter: Painter,
    recogniser: Recogniser,
    names: list[Names],
    *,
    num_single: int = 1000,
    num_other: int = 300,
    guidance: float = 4.5,
) -> dict[str, object]:
    """Every kind of scene at 256 px, 20 steps of DPM-Solver++; and a small sweep of guidance on single objects."""
    report: dict[str, object] = {"guidance": guidance, "steps": 20}
    for kind in (SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE):
        questions = held_out_questions(kind, num_single if kind == SINGLE else num_other, names)
        pictures = painter.draw([q.text for q in questions], guidance=guidance, seed=kind)
        report[KIND_NAMES[kind]] = judge(recogniser, pictures, questions)
    sweep = {}
    questions = held_out_questions(SINGLE, num_other, names, seed=1)
    for scale in (1.0, 2.0, 3.0, 4.5, 6.0):
        result = judge(recogniser, painter.draw([q.text for q in questions], guidance=scale, seed=7), questions)
        sweep[str(scale)] = [round(float(str(result[key])), 4) for key in ("correct", "colour")]
    report["sweep_guidance_correct_colour"] = sweep
    for steps in (10, 40):
        result = judge(recogniser, painter.draw([q.text for q in questions], guidance=guidance, seed=7, steps=steps), questions)
        report[f"correct_{steps}_steps"] = result["correct"]
    sizes = {}
    for width, height in ((320, 192), (192, 320), (320, 320)):
        pictures = painter.draw([q.text for q in questions], guidance=guidance, seed=7, width=width, height=height)
        side = min(width, height)
        square = F.interpolate(
            pictures[:, :, (height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2],
            size=(96, 96), mode="bilinear", antialias=True,
        )  # fmt: skip
        sizes[f"{width}x{height}"] = judge(recogniser, square, questions)["correct"]
    report["correct_by_size"] = sizes
    return report


def grid(pictures: Tensor, captions: list[str], path: Path, *, columns: int = 8, side: int = 160) -> None:
    """A PNG of pictures with their captions beneath, for looking at. Captions in scripts that Pillow's font lacks are shown as
    they can be.
    """
    height = round(side * pictures.shape[2] / pictures.shape[3])
    cell = height + 34
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * side, rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pixels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, text in enumerate(captions):
        left, top = index % columns * side, index // columns * cell
        sheet.paste(Image.fromarray(pixels[index]).resize((side - 4, height - 4), Image.Resampling.LANCZOS), (left + 2, top + 2))
        for line, part in enumerate((text[:28], text[28:56])):
            draw.text((left + 3, top + height + 14 * line), part, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def grid_captions(names: list[Names], num: int) -> list[str]:
    """A mixture for the picture grid: English, mostly held-out combinations of every kind."""
    kinds = [SINGLE, SINGLE, SINGLE, SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE]
    rng = np.random.default_rng(5)
    texts = []
    for index in range(num):
        question = held_out_questions(kinds[index % len(kinds)], 1 + index // len(kinds), names, seed=3)[-1]
        texts.append(caption(question.scene, names, rng, language="en", template=0))
    return texts


__all__ = ["COLOUR_NAMES", "Question", "cut", "evaluate", "grid", "grid_captions", "held_out_questions", "judge"]
