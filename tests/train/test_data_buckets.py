"""Sizes of a resolution, and which one a picture is brought to."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data.buckets import MAX_ASPECT, RESOLUTIONS, Bucket, crop_box, make_buckets, nearest
from train.data.errors import DataError
from train.data.images import fit

sides = st.integers(1, 20_000)
resolutions = st.sampled_from(RESOLUTIONS)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_sizes(resolution):
    buckets = make_buckets(resolution)
    assert len(buckets) == len(set(buckets)) == 33
    assert Bucket(resolution, resolution) in buckets
    for bucket in buckets:
        assert not bucket.width % (resolution // 16)  # 32 px at 512
        assert not bucket.height % (resolution // 16)
        assert abs(bucket.width * bucket.height / resolution**2 - 1) < 0.055
        assert max(bucket.width / bucket.height, bucket.height / bucket.width) <= MAX_ASPECT
        assert Bucket(bucket.height, bucket.width) in buckets
    assert {bucket.height / bucket.width for bucket in (buckets[0], buckets[-1])} == {0.25, 4.0}
    aspects = [bucket.height / bucket.width for bucket in buckets]
    assert all(b / a < 1.17 for a, b in itertools.pairwise(aspects))  # no picture within 4:1 loses more than 8 %


def test_unknown_resolution():
    with pytest.raises(DataError, match="got 768; expected one of 512, 1024, 2048, 4096"):
        make_buckets(768)


@given(resolutions, sides, sides)
def test_nearest_is_nearest(resolution, width, height):
    buckets = make_buckets(resolution)
    got = buckets[nearest(buckets, width, height)]
    factor = [abs(math.log(b.height / b.width * width / height)) for b in buckets]
    assert abs(math.log(got.height / got.width * width / height)) <= min(factor) + 1e-12


@given(resolutions, sides, sides)
def test_a_picture_on_its_side_lands_in_the_bucket_on_its_side(resolution, width, height):
    buckets = make_buckets(resolution)
    one, other = buckets[nearest(buckets, width, height)], buckets[nearest(buckets, height, width)]
    assert (one.width, one.height) == (other.height, other.width) or width == height


@given(resolutions, st.integers(0, 32))
def test_a_buckets_own_size_is_its_bucket(resolution, index):
    buckets = make_buckets(resolution)
    bucket = buckets[index]
    assert nearest(buckets, bucket.width, bucket.height) == index
    assert crop_box(bucket.width, bucket.height, bucket) == (0, 0, bucket.width, bucket.height)


@given(sides, sides, st.integers(0, 32))
def test_crop(width, height, index):
    bucket = make_buckets(512)[index]
    left, top, right, bottom = crop_box(width, height, bucket)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left == pytest.approx(width - right, abs=1e-6)  # the centre
    assert top == pytest.approx(height - bottom, abs=1e-6)
    assert (right - left) / (bottom - top) == pytest.approx(bucket.width / bucket.height)
    assert (left, right) == (0, width) or (top, bottom) == (0, height)


def test_fit_keeps_the_centre_and_its_proportions():
    pixels = np.zeros((100, 400, 3), dtype=np.uint8)
    pixels[:, 150:250] = 255  # a square in the middle of a wide picture
    square = np.asarray(fit(Image.fromarray(pixels), Bucket(512, 512)))
    assert square[:, 16:-16].min() == 255  # the filter looks a little over the edge of the crop
    wide = np.asarray(fit(Image.fromarray(pixels), Bucket(1024, 256)))[128, :, 0]
    assert wide.shape == (1024,)
    assert abs(int((wide > 127).sum()) - 256) <= 2
