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

ROWS, THUMBNAIL = 12, 160  # captions shown; px, longer side
COLUMNS = (("points_lost", "scene score lost, of 100", 1), ("psnr_db", "PSNR, dB", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4))
STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: left; border-bottom: 1px solid #ddd; }
img { display: block; border-radius: 4px } .wide { overflow-x: auto }
"""


def page(summary: Mapping[str, Any], captions: Sequence[str], pictures: Mapping[str, Sequence[Image.Image]]) -> str:
    """summary: what compare_recipes writes. pictures: by the name of who drew them, fp32's first, one a caption.

    The captions with the largest LPIPS of any recipe are shown first.
    """
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"]
    parts.append(f"<title>Recipes of quantization</title><style>{STYLE}</style><h1>Recipes of quantization</h1>")
    count = summary["captions"]
    score = Estimate(**summary["fp32_scene_score"]).text(1)
    parts.append(f"<p>{html.escape(summary['what'])}. {count} captions. The fp32 reference's scene score: {score}.</p>")
    parts.append("<div class=wide><table><tr><th>recipe<th>size of fp16's" + "".join(f"<th>{label}" for _, label, _ in COLUMNS))
    for name, row in summary["recipes"].items():
        cells = "".join(f"<td>{Estimate(**row[key]).text(digits)}" for key, _, digits in COLUMNS)
        parts.append(f"<tr><td>{html.escape(name)}<td>{row['size_ratio']:.3f}{cells}")
    parts.append("</table></div>")
    parts += [f"<h2>{kind}</h2><p>{html.escape(text)}</p>" for kind, text in summary["sentences"].items()]
    worst = [max(pairs["lpips"][place] for pairs in summary["pairs"].values()) for place in range(len(captions))]
    order = sorted(range(len(captions)), key=lambda place: -worst[place])[:ROWS]
    parts.append("<h2>Pictures</h2><div class=wide><table><tr>" + "".join(f"<th>{html.escape(name)}" for name in pictures))
    for place in order:
        parts.append(f"<tr><td colspan={len(pictures)} dir=auto>{html.escape(captions[place])}<tr>")
        parts += [f"<td>{_image(drawn[place], f'{name}: {captions[place]}')}" for name, drawn in pictures.items()]
    return "\n".join([*parts, "</table></div>"]) + "\n"


def _image(picture: Image.Image, alt: str) -> str:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'
