"""PNG files written in stripes: any reader sees the same pixels and text, and the bytes do not depend on the machine."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import runtime.png
from runtime.png import STRIPE_ROWS, encode_png


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 3 * STRIPE_ROWS),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 9),
    smooth=st.booleans(),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
def test_pillow_reads_the_same(height: int, width: int, channels: int, seed: int, smooth: bool, text: str) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    if smooth:
        pixels = np.cumsum(pixels // 100, axis=0, dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels, {"sana": text}))) as image:
        assert isinstance(image, PngImageFile)
        image.load()
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
        assert image.text["sana"] == text


def test_bytes_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (5 * STRIPE_ROWS + 1, 32, 3), np.uint8)
    once = encode_png(pixels, {})
    monkeypatch.setattr(runtime.png, "each", lambda work, items: [work(item) for item in items])
    assert encode_png(pixels, {}) == once


def test_zlib_inflates_the_chunks_as_one_stream() -> None:
    """Pillow does not look at the stream's checksum, which is put together from the stripes'; zlib does."""
    pixels = np.full((3 * STRIPE_ROWS + 1, 300, 3), 255, np.uint8)  # whose sums pass 2**16
    data, at, kinds, stream = encode_png(pixels, {"sana": "a"}), 8, [], b""
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size) == (zlib.crc32(kind + body),)
        kinds.append(kind)
        stream += body if kind == b"IDAT" else b""
        at += size + 12
    assert kinds == [b"IHDR", b"iTXt", *[b"IDAT"] * 6, b"IEND"]
    rows = np.frombuffer(zlib.decompress(stream), np.uint8).reshape(len(pixels), -1)
    assert np.all(rows[:, 0] == 2)
    assert np.array_equal(np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8), pixels.reshape(len(pixels), -1))


def test_a_flat_picture_is_small() -> None:
    assert len(encode_png(np.full((512, 512, 3), 200, np.uint8), {})) < 4096


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (0, 4, 3), (4, 0, 3)])
def test_other_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(height, width"):
        encode_png(np.zeros(shape, np.uint8), {})
    with pytest.raises(ValueError, match="float32"):
        encode_png(np.zeros((2, 2, 3), np.float32), {})
