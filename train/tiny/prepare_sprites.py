"""Draws the emoji of `emoji_list` once, as a small file that training reads.

    python -m train.tiny.prepare_sprites --out out/sprites.safetensors

The file holds `rgba` (S, 128, 128, 4) uint8, straight alpha, each object centred and 124 px on its longer side; the first
sprites are the classes. Its metadata holds the names in six languages and the tokenizer, which is trained here on captions of
the grammar, so that training needs neither the font nor the package `emoji`. The font is Noto Color Emoji (SIL Open Font
License 1.1; Debian package fonts-noto-color-emoji). Its pictures exist at size 109 only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.tiny.captions import LANGUAGES, Names
from train.tiny.emoji_list import CLASSES, EXTRA
from train.tiny.sprites import SIDE

FONT_SIZE = 109  # the only bitmap strike of the font
FIT = 126  # px of the longer side of an object; the rest is a border, so that interpolation ends in transparency
AMBIGUOUS = {"orange", "flipper", "beetle", "birthday", "red car", "boat"}  # also a colour, or more than the emoji shows


def draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """(128, 128, 4) uint8, trimmed to what is visible and centred. Raises ValueError if the font has no picture for `character`."""
    canvas = Image.new("RGBA", (192, 192))
    ImageDraw.Draw(canvas).text((16, 16), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError(f"{character}: the font draws nothing; expected Noto Color Emoji 2.042 or newer (--font)")
    # Resized with premultiplied alpha: straight alpha would bleed the colour of invisible pixels into the rim.
    # Two transparent pixels around it, so that the filter does not ring at a cut edge.
    cut = canvas.crop((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2)).convert("RGBa")
    scale = FIT / max(cut.size)
    cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.LANCZOS)
    cut = cut.convert("RGBA")
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(cut, ((SIDE - cut.width) // 2, (SIDE - cut.height) // 2))
    return np.asarray(sprite)


def names_of(character: str, name: str, plural: str) -> Names:
    """The names of one emoji in all languages of the grammar, from the package `emoji` (Unicode CLDR), lower case."""
    import emoji

    emoji.config.load_language()
    data = emoji.EMOJI_DATA[character]

    def spoken(text: str) -> str:
        return text.strip(":").replace("_", " ").lower()

    others = {spoken(text) for text in (data["en"], *(data.get("alias") or ()))} - {name} - AMBIGUOUS
    return {"en": [name, *sorted(others)], "plural": [plural], **{code: [spoken(data[code])] for code in LANGUAGES if code != "en"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from safetensors.numpy import save_file

    from train.tiny.tokenizer import train_tokenizer

    font = ImageFont.truetype(str(args.font), FONT_SIZE)
    entries = CLASSES + EXTRA
    rgba = np.ascontiguousarray(np.stack([draw(character, font) for character, _, _ in entries]))
    names = [names_of(*entry) for entry in entries]
    tokenizer = train_tokenizer(names[: len(CLASSES)])
    metadata = {
        "names": json.dumps(names, ensure_ascii=False),
        "characters": json.dumps([character for character, _, _ in entries], ensure_ascii=False),
        "num_classes": str(len(CLASSES)),
        "tokenizer": tokenizer.to_str(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"rgba": rgba}, args.out, metadata=metadata)
    size_mb = args.out.stat().st_size / 1e6
    vocabulary = tokenizer.get_vocab_size()
    print(f"{args.out}: {len(entries)} sprites ({len(CLASSES)} classes), {vocabulary} tokens, {size_mb:.1f} MB")


if __name__ == "__main__":
    main()
