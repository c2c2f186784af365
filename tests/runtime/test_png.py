"""PNG files written in stripes: any reader sees the same pixels and text, and the bytes do not depend on the machine."""

import io

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
    monkeypatch.setattr(runtime.png, "MAX_THREADS", 1)
    assert encode_png(pixels, {}) == once


def test_a_flat_picture_is_small() -> None:
    assert len(encode_png(np.full((512, 512, 3), 200, np.uint8), {})) < 4096


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (0, 4, 3), (4, 0, 3)])
def test_other_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(height, width"):
        encode_png(np.zeros(shape, np.uint8), {})
    with pytest.raises(ValueError, match="float32"):
        encode_png(np.zeros((2, 2, 3), np.float32), {})
