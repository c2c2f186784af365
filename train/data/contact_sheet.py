"""`python -m train.data inspect`: a data set's statistics, and some of its pictures with their captions on one sheet."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from train.data.buckets import crop_box, make_buckets, nearest
from train.data.errors import BrokenSample, DataError
from train.data.images import decode
from train.data.report import Broken
from train.data.settings import DataSettings
from train.data.source import Found, read_captions, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ENDINGS", "Statistics", "look", "write_sheet"]

ENDINGS = (".png", ".html")
THUMBNAIL = 192  # px
COLUMNS = 6
LINES, LINE = 3, 30  # of a caption below a picture of a PNG sheet, characters a line
SHOWN_BROKEN = 20


@dataclass(slots=True)
class Statistics:
    """What was seen. sizes: widths and heights in px. cropped: the share of each picture that its bucket leaves out."""

    total: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    buckets: Counter[str] = field(default_factory=Counter)
    cropped: list[float] = field(default_factory=list)
    enlarged: int = 0
    captions: Counter[int] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, to be shown."""
        rows = [("samples", f"{self.total} in all, {len(self.sizes)} looked at and whole, {len(self.broken)} broken")]
        if self.sizes:
            areas = sorted(width * height for width, height in self.sizes)
            widths, heights = zip(*self.sizes, strict=True)
            rows += [
                ("width", f"{min(widths)} to {max(widths)} px"),
                ("height", f"{min(heights)} to {max(heights)} px"),
                ("area", f"median {areas[len(areas) // 2] / 1e6:.2f} million pixels"),
                ("captions a picture", ", ".join(f"{count}: {number}" for count, number in sorted(self.captions.items()))),
                ("characters a caption", f"{min(self.characters)} to {max(self.characters)}, mean {fmean(self.characters):.0f}"),
                ("smaller than their bucket", f"{self.enlarged} pictures would be enlarged"),
                ("cut off by cropping", f"mean {fmean(self.cropped):.1%}, most {max(self.cropped):.1%} of a picture"),
                ("buckets", ", ".join(f"{name}: {number}" for name, number in self.buckets.most_common())),
            ]
            if any(self.scores):
                rows.append(("scores", f"{min(self.scores):g} to {max(self.scores):g}, mean {fmean(self.scores):.4g}"))
        rows += [("broken", str(broken)) for broken in self.broken[:SHOWN_BROKEN]]
        if len(self.broken) > SHOWN_BROKEN:
            rows.append(("broken", f"and {len(self.broken) - SHOWN_BROKEN} more"))
        return rows


@dataclass(frozen=True, slots=True)
class Picture:
    """One of the sheet."""

    key: str
    image: Image
    captions: tuple[str, ...]


def look(
    found: Found, settings: DataSettings, *, pictures: int, most: int | None = None, on_sample: Callable[[int, int], None]
) -> tuple[Statistics, list[Picture]]:
    """Decode `most` samples spread evenly over the data set (all of them: None); keep `pictures` of them for the sheet."""
    chosen = spread(len(found.items), most)
    shown = {chosen[place] for place in spread(len(chosen), pictures)}
    statistics, kept = Statistics(total=found.total, broken=list(found.broken)), []
    buckets = make_buckets(settings.resolution)
    for done, number in enumerate(chosen):
        on_sample(done, len(chosen))
        item = found.items[number]
        try:
            captions = read_captions(found.root, item)
            image = decode(read_image(found.root, item), settings.max_pixels)
        except BrokenSample as error:
            statistics.broken.append(Broken(item.key, str(error)))
            continue
        bucket = buckets[nearest(buckets, *image.size)]
        left, top, right, bottom = crop_box(*image.size, bucket)
        statistics.sizes.append(image.size)
        statistics.buckets[str(bucket)] += 1
        statistics.cropped.append(1 - (right - left) * (bottom - top) / (image.width * image.height))
        statistics.enlarged += right - left < bucket.width
        statistics.captions[len(captions)] += 1
        statistics.characters += [len(caption.text) for caption in captions]
        statistics.scores += [caption.score for caption in captions]
        if number in shown:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            kept.append(Picture(item.key, image, tuple(caption.text for caption in captions)))
    on_sample(len(chosen), len(chosen))
    return statistics, kept


def spread(num: int, most: int | None) -> list[int]:
    """At most `most` of the numbers below `num`, evenly spread."""
    taken = num if most is None else min(num, most)
    return [position * num // taken for position in range(taken)]


def write_sheet(path: Path, title: str, statistics: Statistics, pictures: list[Picture]) -> None:
    """A PNG or an HTML page that needs no other file. Raises DataError for another ending."""
    if path.suffix not in ENDINGS:
        raise DataError(f"--out: got {path.name!r}; expected a name that ends with {' or '.join(ENDINGS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(_page(title, statistics, pictures), encoding="utf-8", errors="backslashreplace")
    else:
        _sheet(title, statistics, pictures).save(path)


def _page(title: str, statistics: Statistics, pictures: list[Picture]) -> str:
    escape = html.escape
    rows = "\n".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in statistics.lines())
    figures = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.image.save(stream, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        captions = "".join(f"<li>{escape(text)}" for text in picture.captions)
        figures.append(
            f'<figure><img src="{source}" alt=""><figcaption>{escape(picture.key)}<ul>{captions}</ul></figcaption></figure>'
        )
    style = (
        "body{font:14px sans-serif;margin:2em}th{text-align:left;vertical-align:top;padding-right:2em}"
        f"figure{{display:inline-block;vertical-align:top;width:{THUMBNAIL}px;margin:8px}}figcaption{{overflow-wrap:anywhere}}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<h1>{escape(title)}</h1>\n<table>\n{rows}\n</table>\n" + "\n".join(figures) + "\n"
    )


def _sheet(title: str, statistics: Statistics, pictures: list[Picture]) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(12)
    columns = max(1, min(COLUMNS, len(pictures)))
    cell, gap, step = THUMBNAIL, 8, 15
    width = max(COLUMNS, columns) * (cell + gap) + gap
    table = [title, *(f"{name}: {value}" for name, value in statistics.lines())]
    head = [line for row in table for line in textwrap.wrap(row, (width - 2 * gap) // 7) or [""]]
    below = (LINES + 1) * step
    height = gap + len(head) * step + math.ceil(len(pictures) / columns) * (cell + below + gap) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(head):
        draw.text((gap, gap + number * step), line, "black", font)
    for number, picture in enumerate(pictures):
        left = gap + number % columns * (cell + gap)
        top = 2 * gap + len(head) * step + number // columns * (cell + below + gap)
        sheet.paste(picture.image, (left + (cell - picture.image.width) // 2, top + (cell - picture.image.height) // 2))
        lines = [picture.key[-LINE:], *textwrap.wrap(" | ".join(picture.captions), LINE)[:LINES]]
        for row, line in enumerate(lines):
            draw.text((left, top + cell + row * step), line, "grey" if row == 0 else "black", font)
    return sheet
