"""Pixels: from the decoder's output to a picture, and to and from PNG files that say how they were drawn."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.disk import human_bytes
from engines.errors import DiskFullError, RequestError, SanaError
from runtime.picture_info import PictureInfo, parse_picture_info
from runtime.png import encode_png
from runtime.together import MAX_THREADS, each

__all__ = ["INFO_KEY", "not_finite", "png_bytes", "read_picture", "read_picture_info", "save_png", "to_images", "to_levels"]

PART_PIXELS = 1 << 18  # that a thread turns into levels at a time, at least: four parts of a picture of 1024 px
INFO_KEY = "sana"  # the keyword of the PNG's iTXt chunk, and the key in PIL's Image.info


def to_images(decoded: NDArray[np.float32]) -> list[Image.Image]:
    """to_levels as pictures."""
    return [Image.fromarray(picture) for picture in to_levels(decoded)]


def to_levels(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Decoder output as (B, H, W, 3) uint8.

    decoded: (B, 3, H, W) float32, RGB, nominally -1 to 1. Clamped, scaled to 0..255 and rounded half to even, in float32, as
    diffusers' VaeImageProcessor does it. Raises SanaError if a number is not finite.
    """
    batch, _, height, width = decoded.shape
    pixels = np.empty((batch, height, width, 3), np.uint8)
    # On several threads, and by parts that are not small: each pass lets go of Python's lock, and has to get it back among others.
    rows = max(-(-height // MAX_THREADS), -(-PART_PIXELS // width))
    parts = [(number, slice(start, start + rows)) for number in range(batch) for start in range(0, height, rows)]
    if not all(each(lambda part: _to_levels(decoded, pixels, *part), parts)):
        raise not_finite(int(np.size(decoded) - np.isfinite(decoded).sum()))
    return pixels


def not_finite(count: int) -> SanaError:
    """What is raised where so many numbers of a decoder's output are none."""
    return SanaError(
        f"decoder: got {count} pixels that are not finite numbers; expected none. A precision is too narrow for this model: "
        "rebuild with --precision bf16 or fp32."
    )


def _to_levels(decoded: NDArray[np.float32], pixels: NDArray[np.uint8], number: int, rows: slice) -> bool:
    """Some rows of one picture into `pixels`; False, and no rows, if a number is not finite."""
    part = decoded[number, :, rows]
    if not (np.isfinite(part.max()) and np.isfinite(part.min())):
        return False
    levels = np.clip(part, -1, 1)
    levels += np.float32(1)
    levels *= np.float32(127.5)  # to the bit what (x / 2 + 1/2) * 255 is: halving rounds nothing
    np.rint(levels, out=levels)
    for channel, plane in enumerate(levels.astype(np.uint8)):  # first, because to cast and to spread at once is slower
        pixels[number, rows, :, channel] = plane
    return True


def png_bytes(image: Image.Image) -> bytes:
    """A PNG file of `image`, which is RGB, with the PictureInfo that generate() put into it, if any. Raises RequestError for
    another mode."""
    if image.mode != "RGB":
        raise RequestError(f"picture: got the mode {image.mode!r}; expected RGB. Convert it: image.convert('RGB').")
    text = {INFO_KEY: image.info[INFO_KEY]} if INFO_KEY in image.info else {}
    return encode_png(np.asarray(image), text)


def save_png(image: Image.Image, path: Path | str) -> Path:
    """Write `image` with the PictureInfo that generate() put into it, if any. Appears whole or not at all.

    Missing folders are made. Raises RequestError for another suffix than .png and as png_bytes, DiskFullError.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise RequestError(f"picture file: got {path.name!r}; expected a name that ends in .png, which keeps pixels and metadata.")
    data = png_bytes(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        raise DiskFullError(
            f"disk full: got {human_bytes(free)} free at {path.parent}; expected room for a picture of "
            f"{image.width}x{image.height} px. Free some space, or choose another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_picture_info(path: Path | str) -> PictureInfo:
    """How a PNG was drawn, without decoding its pixels. Raises as read_picture."""
    with _open(Path(path)) as image:
        return _info(image, path)


def read_picture(path: Path | str) -> tuple[Image.Image, PictureInfo]:
    """A PNG that save_png wrote, and how it was drawn.

    Raises RequestError for a file that is missing, not a PNG, or without our metadata; ManifestError if that is broken.
    """
    with _open(Path(path)) as image:
        info = _info(image, path)
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise RequestError(f"{path}: the pixels cannot be read ({error}). Was the file cut off?") from None
        return image.copy(), info


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=["PNG"])
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; expected a PNG that sana drew.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: cannot be read as a PNG ({error}); expected a picture that sana drew.") from None


def _info(image: Image.Image, path: Path | str) -> PictureInfo:
    text = image.info.get(INFO_KEY)  # what stands before the pixels, where save_png puts it
    if not isinstance(text, str):
        raise RequestError(
            f"{path}: a PNG without metadata of sana; expected a picture that sana drew. Some programs drop metadata."
        )
    return parse_picture_info(text, source=f"{path} (metadata)")
