"""The quality section of parity.json: how far a bundle's pictures are from others of the same prompts and seeds.

docs/bundle.md describes it. The page of pictures is a function of the section, so that a page can be told from another one before a
browser is let at it.
"""

from __future__ import annotations

import html
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PAGE_NAME", "Against", "Estimate", "PictureRow", "QualityReport", "SceneScores", "page"]

PAGE_NAME = "quality/index.html"
MAX_ROWS = 200

Real = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
PictureName = Annotated[str, Field(pattern=r"^[0-9]{3}-(first|second|difference)\.png$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Estimate(_Model):
    """A mean, and the ends of its 95 % interval: a bootstrap over prompts, and over the seeds of each."""

    mean: Real
    low: Real
    high: Real

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.high:
            raise ValueError(f"interval: got {self.low} to {self.high}; expected the lower end first")
        return self

    def text(self, digits: int) -> str:
        return f"{self.mean:.{digits}f} (95 %: {self.low:.{digits}f} to {self.high:.{digits}f})"


class Against(_Model):
    """Whose pictures these are compared with."""

    kind: Literal["bundle", "reference"]  # reference: PyTorch
    name: Text  # what a column of the page is called: "fp16", "PyTorch fp32"
    digest: Sha256  # of the bundle, or of the reference's checkpoint


class SceneScores(_Model):
    """Shares of 100 pictures that show every object in its place and the right background, as a judge sees them."""

    judge: Sha256  # of the recogniser's weights
    first: Estimate  # what it is compared with
    second: Estimate  # this bundle
    points_lost: Estimate  # first - second, of the same prompts and seeds


class PictureRow(_Model):
    """A row of the page. pictures: names beside it of the first, this bundle's, and their difference."""

    prompt: Text
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    psnr_db: Real
    ssim: Real
    lpips: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    pictures: tuple[PictureName, PictureName, PictureName]


class QualityReport(_Model):
    against: Against
    name: Text  # of this bundle's column: "nvfp4"
    backend: Text  # what drew this bundle's pictures
    prompts: Count
    seeds: Count  # for each prompt
    psnr_db: Estimate  # dB
    ssim: Estimate  # 1: the same
    lpips: Estimate  # 0: the same
    scores: SceneScores | None = None  # none where there is no judge
    amplified: Annotated[int, Field(ge=1, le=255)]  # the factor on the differences that are shown
    rows: Annotated[tuple[PictureRow, ...], Field(max_length=MAX_ROWS)]  # the worst first, by LPIPS

    def lines(self) -> list[str]:
        """The numbers, a line each."""
        found = [
            f"{self.prompts} prompts by {self.seeds} seeds, drawn by {self.backend}, against {self.against.name} "
            f"({self.against.kind} {self.against.digest[:12]})",
            f"PSNR {self.psnr_db.text(2)} dB",
            f"SSIM {self.ssim.text(4)}",
            f"LPIPS {self.lpips.text(5)}",
        ]
        if self.scores is not None:
            found += [
                f"scene score of {self.against.name} {self.scores.first.text(1)}, of {self.name} "
                f"{self.scores.second.text(1)}, of 100",
                f"points lost {self.scores.points_lost.text(2)} (judge {self.scores.judge[:12]})",
            ]
        return found


_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; width: 100%; table-layout: fixed } td, th { padding: .3em; text-align: left }
img { width: 100%; border-radius: 4px } caption, .said { font-size: 13px; overflow-wrap: anywhere }
"""


def page(quality: QualityReport) -> str:
    """HTML that shows the section's rows; its pictures are beside it. The same section gives the same text."""
    escape = html.escape
    title = escape(f"{quality.against.name} | {quality.name} | difference x {quality.amplified}")
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"]
    parts.append(
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'\">"
    )
    parts.append(f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>")
    parts += [f"<p>{escape(line)}</p>" for line in quality.lines()]
    parts.append(f"<p>The {len(quality.rows)} pairs that differ most are shown, the worst first, by LPIPS.</p>")
    heads = (quality.against.name, quality.name, f"difference x {quality.amplified}")
    parts.append("<table><tr>" + "".join(f"<th>{escape(head)}" for head in heads) + "</tr>")
    for row in quality.rows:
        said = f"{row.prompt} (seed {row.seed}): PSNR {row.psnr_db:.2f} dB, SSIM {row.ssim:.4f}, LPIPS {row.lpips:.5f}"
        parts.append(f"<tr><td colspan=3 class=said dir=auto>{escape(said)}</tr><tr>")
        parts.append(
            "".join(f'<td><img alt="{escape(head)}" src="{name}">' for head, name in zip(heads, row.pictures, strict=True))
        )
        parts.append("</tr>")
    return "\n".join([*parts, "</table>"]) + "\n"
