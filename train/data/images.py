"""From a file's bytes to a bucket's pixels. What the file claims is checked before anything is decoded."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from train.data.buckets import Bucket, crop_box
from train.data.errors import BrokenSample

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_IMAGE_BYTES", "SUFFIXES", "decode", "fit", "open_image"]

FORMATS = ("JPEG", "PNG", "WEBP")  # alone are looked for: each decoder is code that strangers' bytes reach
SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_IMAGE_BYTES = 512 * 2**20
SHARP_FROM = 2048  # px; Sana resamples its 2K and 4K sizes with Lanczos, smaller ones bicubically


def open_image(content: bytes, max_pixels: int) -> Image:
    """A picture whose header has been read and whose pixels have not. Raises BrokenSample."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is max_pixels
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # whatever the library raises for these bytes, the sample is what is wrong
        raise BrokenSample(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture ({_first_line(error)})") from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise BrokenSample(f"got {image.width} x {image.height} = {pixels} pixels; expected at most {max_pixels} (max_pixels)")
    if image.mode.startswith(("I", "F")):
        raise BrokenSample(f"got pixels of mode {image.mode}; expected 8 bits a channel")
    return image


def decode(content: bytes, max_pixels: int) -> Image:
    """The picture in RGB, the way up that it is shown, transparency on white. Raises BrokenSample."""
    from PIL import Image, ImageOps

    image = open_image(content, max_pixels)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BrokenSample(f"cannot be decoded ({_first_line(error)})") from None


def fit(image: Image, bucket: Bucket) -> Image:
    """The centre of the picture with the bucket's aspect ratio, resized to the bucket."""
    from PIL import Image

    sharp = bucket.width * bucket.height > SHARP_FROM**2 // 2  # areas are close to the square of the resolution
    resample = Image.Resampling.LANCZOS if sharp else Image.Resampling.BICUBIC
    return image.resize((bucket.width, bucket.height), resample, box=crop_box(*image.size, bucket))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
