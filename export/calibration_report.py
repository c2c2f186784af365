"""What a calibration saw and chose, for people: calibration.json, and calibration.html with the ranges per layer and step."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sana_ref.quantization import Format

__all__ = ["CalibrationReport", "LayerReport", "page", "write_report"]

CELL_WIDTH, CELL_HEIGHT, LABEL = 22, 14, 260  # px of the plot
STYLE = """
:root { --paper: #fff; --ink: #222; --faint: #ddd } body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto;
max-width: 76em; padding: 0 1em; color: var(--ink); background: var(--paper) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .8em; border-bottom: 1px solid var(--faint); text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: currentColor } .wide { overflow-x: auto }
@media (prefers-color-scheme: dark) { :root { --paper: #16181a; --ink: #ddd; --faint: #3a3d40 } }
"""


class LayerReport(BaseModel):
    """Of one group. largest: absolute activation over everything. ranges: the same of each step, the first has most noise.

    input_scale, exponent (of the smoothing) and error (squared, of the layer's result on kept tokens, of the result's own square):
    of groups that are quantized, where there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    group: str
    format: Format
    largest: float
    ranges: list[float]
    input_scale: float | None
    exponent: float | None
    error: float | None


class CalibrationReport(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    notes: dict[str, str]
    layers: list[LayerReport]


def write_report(folder: Path, layers: Sequence[LayerReport], notes: Mapping[str, str]) -> None:
    report = CalibrationReport(notes=dict(notes), layers=list(layers))
    (folder / "calibration.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / "calibration.html").write_text(page(report), encoding="utf-8")


def page(report: CalibrationReport) -> str:
    """One HTML page that needs nothing beside it."""
    rows = "".join(_table_row(layer) for layer in report.layers)
    notes = "".join(f"<li>{html.escape(name)}: {html.escape(text)}" for name, text in sorted(report.notes.items()))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Calibration</title><style>{STYLE}</style><h1>Calibration</h1><ul>{notes}</ul>"
        "<h2>Ranges</h2><p>The largest absolute activation that goes into each group of layers, a step a column, from noise on the "
        f"left to picture. Darker is larger; the scale is logarithmic.</p><div class=wide>{_heat_map(report.layers)}</div>"
        "<h2>Groups</h2><div class=wide><table><tr><th>group<th>format<th>largest<th>largest step / smallest<th>scale<th>"
        f"smoothing's exponent<th>error of the result, rms{rows}</table></div></html>\n"
    )


def _table_row(layer: LayerReport) -> str:
    least = min(layer.ranges)
    spread = f"{max(layer.ranges) / least:.1f}" if least > 0 else "–"
    scale = "–" if layer.format == "none" else "dynamic" if layer.input_scale is None else f"{layer.input_scale:.4g}"
    exponent = "–" if layer.exponent is None else f"{layer.exponent:g}"
    error = "–" if layer.error is None else f"{100 * math.sqrt(layer.error):.2f} %"
    cells = (layer.format, f"{layer.largest:.4g}", spread, scale, exponent, error)
    return f"<tr><td>{html.escape(layer.group)}" + "".join(f"<td>{cell}" for cell in cells)


def _heat_map(layers: Sequence[LayerReport]) -> str:
    values = [value for layer in layers for value in layer.ranges if value > 0]
    low, high = math.log(min(values)), math.log(max(values))
    num_steps = max(len(layer.ranges) for layer in layers)
    width, height = LABEL + CELL_WIDTH * num_steps, CELL_HEIGHT * (len(layers) + 1)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="Ranges per layer and step">']
    for row, layer in enumerate(layers):
        top = row * CELL_HEIGHT
        parts.append(f'<text x="0" y="{top + 11}">{html.escape(layer.group)}</text>')
        for step, value in enumerate(layer.ranges):
            shade = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
            parts.append(
                f'<rect x="{LABEL + step * CELL_WIDTH}" y="{top}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" '
                f'fill="hsl({220 - 200 * shade:.0f} 65% {88 - 50 * shade:.0f}%)"><title>{html.escape(layer.group)}, '
                f"step {step + 1}: {value:.4g}</title></rect>"
            )
    for step in range(0, num_steps, 5):
        parts.append(f'<text x="{LABEL + step * CELL_WIDTH}" y="{height - 3}">step {step + 1}</text>')
    return "".join(parts) + "</svg>"
