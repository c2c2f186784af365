"""What validation found, as a page: a small plot of each score, and the pictures, newest first. Plain HTML, readable offline."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["picture_name", "read_scores", "write_page", "write_scores"]

Scores = Mapping[int, Mapping[str, float]]  # step -> name -> value
WIDTH, HEIGHT = 240, 60  # px, of a plot
STYLE = "body{font:14px sans-serif;margin:2em}figure{display:inline-block;margin:0 1em 1em 0}img{max-width:100%}"


def picture_name(step: int) -> str:
    return f"step_{step:08d}.png"


def read_scores(folder: Path) -> dict[int, dict[str, float]]:
    """What earlier parts of the run found; nothing if the file is damaged: it is for looking at."""
    try:
        return {int(step): dict(values) for step, values in json.loads((folder / "scores.json").read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_scores(folder: Path, scores: Scores) -> None:
    """Raises OSError."""
    _put(folder / "scores.json", json.dumps({str(step): dict(scores[step]) for step in sorted(scores)}, indent=1) + "\n")


def write_page(folder: Path, title: str, scores: Scores) -> None:
    """Raises OSError."""
    steps = sorted(scores)
    names = dict.fromkeys(name for step in steps for name in scores[step])
    plots = [_plot(name, [(step, scores[step][name]) for step in steps if name in scores[step]]) for name in names]
    pictures = [
        f'<h2>Step {step}</h2><img src="{picture_name(step)}" alt="the pictures at step {step}">'
        for step in reversed(steps)
        if (folder / picture_name(step)).is_file()
    ]
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    _put(folder / "index.html", "\n".join([head, f"<h1>{html.escape(title)}</h1>", *plots, *pictures]) + "\n")


def _plot(name: str, points: list[tuple[int, float]]) -> str:
    xs, ys = zip(*points, strict=True)
    left, low = xs[0], min(ys)
    across, up = max(xs[-1] - left, 1), (max(ys) - low) or 1.0
    line = " ".join(f"{(x - left) / across * WIDTH:.1f},{HEIGHT - (y - low) / up * HEIGHT:.1f}" for x, y in points)
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" style="overflow:visible">'
        f'<polyline points="{line}" fill="none" stroke="#36c" stroke-width="2"/></svg>'
        f"<figcaption>{html.escape(name)}: {ys[-1]:.4f} ({low:.4f} to {max(ys):.4f})</figcaption></figure>"
    )


def _put(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
