"""The comparison of recipes as one HTML page that needs nothing beside it: a table, sentences, and pictures side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from engines.quality_report import Estimate

__all__ = ["page"]

ROWS, THUMBNAIL = 12, 160  # pictures shown; px, longer side
COLUMNS = (("points_lost", "scene score lost, of 100", 1), ("psnr_db", "PSNR, dB", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4))
STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: left; border-bottom: 1px solid #ddd; }
img { display: block; border-radius: 4px } .wide { overflow-x: auto }
"""


def page(
    summary: Mapping[str, Any], asked: Sequence[tuple[str, Sequence[int]]], pictures: Mapping[tuple[str, str, int], Image.Image]
) -> str:
    """summary: what compare_recipes writes. asked: captions and the seeds of their pictures. pictures: by who, caption and seed.

    Those with the largest LPIPS of a recipe that drew all of them are shown first.
    """
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"]
    parts.append(f"<title>Recipes of quantization</title><style>{STYLE}</style><h1>Recipes of quantization</h1>")
    scores = "; ".join(f"{html.escape(name)} {Estimate(**each).text(1)}" for name, each in summary["scene_scores"].items())
    parts.append(f"<p>{html.escape(summary['what'])}. Scene scores, of 100: {scores}.</p>")
    parts.append(
        "<div class=wide><table><tr><th>recipe<th>pictures<th>size of fp16's" + "".join(f"<th>{label}" for _, label, _ in COLUMNS)
    )
    for name, row in summary["recipes"].items():
        cells = "".join(f"<td>{Estimate(**row[key]).text(digits)}" for key, _, digits in COLUMNS)
        parts.append(f"<tr><td>{html.escape(name)}<td>{row['pictures']}<td>{row['size_ratio']:.3f}{cells}")
    parts.append("</table></div>")
    parts += [f"<h2>{kind}</h2><p>{html.escape(text)}</p>" for kind, text in summary["sentences"].items()]
    who = list(dict.fromkeys(name for name, _, _ in pictures))
    whole = [pairs["lpips"] for pairs in summary["pairs"].values() if len(pairs["lpips"]) == len(asked)]
    worst = {
        (text, seed): max(lpips[place][turn] for lpips in whole)
        for place, (text, seeds) in enumerate(asked)
        for turn, seed in enumerate(seeds)
    }
    parts.append("<h2>Pictures</h2><div class=wide><table><tr>" + "".join(f"<th>{html.escape(name)}" for name in who))
    for text, seed in sorted(worst, key=lambda each: -worst[each])[:ROWS]:
        parts.append(f"<tr><td colspan={len(who)} dir=auto>{html.escape(text)}, seed {seed}<tr>")
        drawn = [(f"{name}: {text}", pictures.get((name, text, seed))) for name in who]
        parts += ["<td>" if picture is None else f"<td>{_image(picture, words)}" for words, picture in drawn]
    return "\n".join([*parts, "</table></div>"]) + "\n"


def _image(picture: Image.Image, alt: str) -> str:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'
