"""Small charts as SVG text, for pages that need nothing beside them: points and lines over linear or logarithmic axes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from engines.errors import RequestError

__all__ = ["COLOURS", "Axis", "Series", "chart"]

COLOURS = ("#2f6f4f", "#c4572b", "#3b62a8", "#8a5aa8", "#b08a1e", "#2a8c94", "#a83b5c", "#666666")  # told apart by most eyes
WIDTH, HEIGHT = 640, 360  # of the drawing, px
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 48  # around the plot


@dataclass(frozen=True, kw_only=True)
class Axis:
    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None  # values and words; chosen unless given


@dataclass(frozen=True, kw_only=True)
class Series:
    """points: x, y. words: what a pointer over each is told; empty, or one for each. filled: of each, whether it is a full disc."""

    name: str
    points: Sequence[tuple[float, float]]
    words: Sequence[str] = ()
    filled: Sequence[bool] = ()
    line: bool = True
    dots: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float  # px where low is
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """An <svg> element. Raises RequestError if there is nothing to draw, or a value that a logarithm does not take."""
    points = [point for each in series for point in each.points]
    if not points:
        raise RequestError(f"{title}: got no points; expected at least one.")
    for axis, values in ((x, [p[0] for p in points]), (y, [p[1] for p in points])):
        if not all(math.isfinite(value) and (value > 0 or not axis.log) for value in values):
            wanted = "positive" if axis.log else "finite"
            raise RequestError(f"{title}, {axis.label}: got {values[:5]}; expected {wanted} values.")
    across = _scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT, zero=False)
    up = _scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP, zero=True)
    legend_height = 18 * -(-len(series) // 2)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + legend_height}" role="img" aria-label="{html.escape(title)}">'
        f"<title>{html.escape(title)}</title>"
    ]
    parts += [_grid(across, x, vertical=True), _grid(up, y, vertical=False)]
    for number, each in enumerate(series):
        parts.append(_drawn(each, COLOURS[number % len(COLOURS)], across, up))
        column, line = number % 2, number // 2
        left, top = LEFT - 40 + column * (WIDTH // 2), HEIGHT + 14 + 18 * line
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<circle cx="{left}" cy="{top - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 10}" y="{top}">{html.escape(each.name)}</text>')
    return "".join(parts) + "</svg>"


def _scale(axis: Axis, values: Sequence[float], start: float, end: float, *, zero: bool) -> _Scale:
    low, high = min(values), max(values)
    if axis.log:
        low, high = low / 1.3, high * 1.3
    else:
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (0.0 if zero and low > 0 and low < 0.6 * high else low - room), high + room
    return _Scale(low, high, start, end, axis.log)


def _ticks(scale: _Scale) -> list[tuple[float, str]]:
    if scale.log:
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        steps = (1,) if len(powers) > 4 else (1, 2, 5)
        found = _within(scale, [step * 10.0**power for power in powers for step in steps])
        if len(found) > 1:
            return found  # else the axis is shorter than from one such number to the next: as a linear one
    rough = (scale.high - scale.low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
    return _within(scale, [step * n for n in range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1)])


def _within(scale: _Scale, values: Sequence[float]) -> list[tuple[float, str]]:
    return [(value, _short(value)) for value in values if scale.low <= value <= scale.high]


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.6g}"


def _grid(scale: _Scale, axis: Axis, *, vertical: bool) -> str:
    parts = []
    for value, words in axis.ticks if axis.ticks is not None else _ticks(scale):
        at = f"{scale(value):.1f}"
        if vertical:
            parts.append(f'<path d="M{at} {TOP}V{HEIGHT - BOTTOM}" class="grid"/>')
            parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{html.escape(words)}</text>')
        else:
            parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".35em" text-anchor="end">{html.escape(words)}</text>')
    label = html.escape(axis.label)
    if vertical:
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{label}</text>')
    else:
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _drawn(series: Series, colour: str, across: _Scale, up: _Scale) -> str:
    places = [(f"{across(px):.1f}", f"{up(py):.1f}") for px, py in series.points]
    parts = []
    if series.line and len(places) > 1:
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        path = "M" + "L".join(f"{px} {py}" for px, py in places)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
    for number, (px, py) in enumerate(places if series.dots else ()):
        words = f"<title>{html.escape(series.words[number])}</title>" if series.words else ""
        fill = colour if not series.filled or series.filled[number] else "var(--paper)"
        parts.append(f'<circle cx="{px}" cy="{py}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5">{words}</circle>')
    return "".join(parts)
