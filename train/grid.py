"""Pictures side by side in one PNG, each with its caption beneath, for looking at."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["grid"]

LINE, LINES = 14, 2  # px, of captions


def grid(pictures: Tensor, captions: Sequence[str], path: Path, *, columns: int = 8, side: int = 160) -> None:
    """pictures: (n, 3, H, W), -1 to 1, all of them in cells `side` px wide. Appears whole or not at all.

    Pillow's font lacks some scripts and shows boxes for them.
    """
    height = round(side * pictures.shape[2] / pictures.shape[3])
    cell = height + LINES * LINE + 6
    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * side, rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pixels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, text in enumerate(captions):
        left, top = index % columns * side, index // columns * cell
        sheet.paste(Image.fromarray(pixels[index]).resize((side - 4, height - 4), Image.Resampling.LANCZOS), (left + 2, top + 2))
        for line, part in enumerate(textwrap.wrap(text, side // 6 + 2)[:LINES]):
            draw.text((left + 3, top + height + LINE * line), part, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, "PNG", optimize=True)
    os.replace(temporary, path)
