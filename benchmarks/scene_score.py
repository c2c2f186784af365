"""What a scene score is: which pictures answer which question, how sure the share is, and two distances in the judge's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.tiny.captions import ABOVE_BELOW, LEFT_RIGHT, SINGLE, THREE, TWO
from train.tiny.evaluate import Question, Verdict
from train.tiny.recogniser import Recogniser

__all__ = ["CATEGORIES", "Score", "diversity", "frechet_distance", "scores", "wilson"]

Z = 1.959964  # of a normal distribution: 95 % lie within
PAIRS, GROUPS = (LEFT_RIGHT, ABOVE_BELOW), (TWO, THREE)
CATEGORIES = {
    "single": "one object, the right one",
    "two": "both of two objects, wherever they are",
    "counting": "two or three of an object, each where the grammar puts it",
    "colour": "the background, in every scene",
    "position": "left and right, above and below: both objects, each in its place",
    "language": "every object in its place, captions in other languages than English",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`right` of `total` pictures; low and high are the 95 % confidence interval of the share."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right} of {self.total}, {100 * self.share:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson's score interval); unlike the usual one it is right near 0 and 1."""
    share, spread = right / total, Z * Z / total
    centre = share + spread / 2
    reach = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))


def hit(category: str, question: Question, verdict: Verdict) -> bool | None:
    """Whether a picture answers a category's question; None if it is not asked of this picture."""
    scene = question.scene
    if category == "colour":
        return verdict.colour
    if category == "language":
        return None if question.language == "en" else verdict.right
    asked = {"single": (SINGLE,), "two": PAIRS, "position": PAIRS, "counting": GROUPS}[category]
    if scene.kind not in asked:
        return None
    return set(verdict.guess) == {scene.first, scene.second} if category == "two" else verdict.right


def scores(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """By category; a category that no picture is asked about is left out."""
    found = {}
    for category in CATEGORIES:
        hits = [hit(category, *pair) for pair in zip(questions, verdicts, strict=True)]
        asked = [each for each in hits if each is not None]
        if asked:
            found[category] = Score(right=sum(asked), total=len(asked))
    return found


class _Features(nn.Module):
    """The judge's features in the form that torchmetrics asks for."""

    def __init__(self, judge: Recogniser) -> None:
        super().__init__()
        self.judge = judge
        self.num_features = judge.head.in_features

    def forward(self, pictures: Tensor) -> Tensor:
        return self.judge.features(pictures).float()


@torch.inference_mode()
def frechet_distance(judge: Recogniser, pictures: Tensor, real: Tensor, *, batch: int = 128) -> float:
    """Fréchet distance of Gaussians fitted to the judge's features (Heusel et al., arXiv:1706.08500, with this judge in place of
    Inception): 0 for equal distributions. Depends on the number of pictures: compare only equal numbers.

    pictures, real: (n, 3, H, W) fp32, -1 to 1; at least two each.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(judge))
    for images, is_real in ((pictures, False), (real, True)):
        for part in images.split(batch):
            metric.update(part, real=is_real)
    return float(metric.compute())


@torch.inference_mode()
def diversity(judge: Recogniser, pictures: Tensor) -> float:
    """Mean distance between the judge's features of pictures of one caption from different seeds: 1 - cosine of every pair.

    pictures: (captions, seeds, 3, H, W) fp32, -1 to 1. 0: all seeds give the same picture.
    """
    features = torch.stack([judge.features(each).float() for each in pictures])
    features = torch.nn.functional.normalize(features, dim=-1)
    cosine = features @ features.transpose(1, 2)
    first, second = torch.triu_indices(cosine.shape[1], cosine.shape[1], offset=1)
    return float((1 - cosine[:, first, second]).mean().clamp(min=0))
