"""A judge of pictures whose captions say all that they show: sana-tiny's recogniser and the captions that its training left out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from train.tiny import recogniser
from train.tiny.captions import KIND_NAMES, Scene
from train.tiny.evaluate import Question, judge
from train.trainer.errors import TrainingError

__all__ = ["Judge"]


@dataclass(frozen=True, kw_only=True)
class Judge:
    eye: recogniser.Recogniser
    questions: dict[str, list[Question]]  # by kind of scene

    @classmethod
    def load(cls, folder: Path, num: int) -> Self:
        """folder: with recogniser/ and held_out_captions.json. num: captions of each kind, at most. Raises TrainingError."""
        try:
            eye, _ = recogniser.load(folder / "recogniser")
            kinds = json.loads((folder / "held_out_captions.json").read_text(encoding="utf-8"))
            questions = {
                kind: [
                    Question(row["caption"], row["language"], Scene(number, row["first"], row["second"], row["colour"]))
                    for row in kinds[kind][:num]
                ]
                for number, kind in enumerate(KIND_NAMES)
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"validation.judge: {folder} cannot be read ({error!r}); expected recogniser/ and held_out_captions.json, as "
                "models/sana-tiny has. Set it to null to draw without scores."
            ) from None
        return cls(eye=eye, questions={kind: asked for kind, asked in questions.items() if asked})

    @property
    def captions(self) -> list[str]:
        return [question.text for asked in self.questions.values() for question in asked]

    def scores(self, pictures: Tensor) -> dict[str, float]:
        """pictures: (n, 3, H, W) fp32 on the CPU, -1 to 1, in the order of `captions`.

        Of each kind the share with every object right and in its place, that of all, and the share on the right background.
        """
        found, verdicts = {}, []
        parts = torch.split(pictures, [len(asked) for asked in self.questions.values()])
        for (kind, asked), part in zip(self.questions.items(), parts, strict=True):
            seen = judge(self.eye, part, asked)
            found[f"scene_{kind}"] = sum(verdict.right for verdict in seen) / len(seen)
            verdicts += seen
        found["scene_all"] = sum(verdict.right for verdict in verdicts) / len(verdicts)
        found["scene_colour"] = sum(verdict.colour for verdict in verdicts) / len(verdicts)
        return found
