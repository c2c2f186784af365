"""Scores and pictures of a quality run as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from benchmarks.scene_score import CATEGORIES, Score
from train.tiny.captions import KIND_NAMES
from train.tiny.evaluate import Question, Verdict

__all__ = ["page"]

THUMBNAIL = 144  # px, longer side
STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .3em .9em; text-align: left; border-bottom: 1px solid #ddd }
.sheet { display: flex; flex-wrap: wrap; gap: 10px } figure { margin: 0; width: 144px; font-size: 12px }
figcaption { overflow-wrap: anywhere } .table { overflow-x: auto }
img { width: 100%; box-sizing: border-box; border-radius: 4px; border: 3px solid #3a7 }
.miss img { border-color: #d33 } .miss { color: #b11 }
"""


def page(
    title: str,
    lines: Sequence[str],
    found: Mapping[str, Score],
    own: Mapping[str, Score],
    pictures: Sequence[Image.Image],
    questions: Sequence[Question],
    verdicts: Sequence[Verdict],
    classes: Sequence[str],
) -> str:
    """The page's text. lines: said under the title; own: the judge's score on real scenes of the same captions, if it was taken."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"]
    parts.append(f"<title>{html.escape(title)}</title><style>{STYLE}</style>")
    parts.append(f"<h1>{html.escape(title)}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines))
    parts.append("<div class=table><table><tr><th>category<th>what must be right<th>pictures<th>judge on real scenes</tr>")
    for name, score in found.items():
        judged = str(own[name]) if name in own else "not taken"
        parts.append(f"<tr><td>{name}<td>{html.escape(CATEGORIES[name])}<td>{score}<td>{judged}</tr>")
    parts.append("</table></div>")
    for kind, name in enumerate(KIND_NAMES):
        rows = [i for i, question in enumerate(questions) if question.scene.kind == kind]
        if rows:
            rows.sort(key=lambda i: (verdicts[i].right, verdicts[i].colour))  # misses first
            missed = sum(not (verdicts[i].right and verdicts[i].colour) for i in rows)
            parts.append(f"<h2>{name.replace('_', ' ')}: {missed} of {len(rows)} not as said</h2><div class=sheet>")
            parts += [_figure(pictures[i], questions[i], verdicts[i], classes) for i in rows]
            parts.append("</div>")
    return "\n".join(parts) + "\n"


def _figure(picture: Image.Image, question: Question, verdict: Verdict, classes: Sequence[str]) -> str:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    caption = html.escape(question.text)
    problems = [] if verdict.right else ["seen: " + ", ".join(classes[guess] for guess in verdict.guess)]
    problems += [] if verdict.colour else ["another background"]
    said = f"<br>{html.escape('; '.join(problems))}" if problems else ""
    kind = " class=miss" if problems else ""
    return (
        f'<figure{kind}><img alt="{caption}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption dir=auto>{caption}{said}</figcaption></figure>"
    )
