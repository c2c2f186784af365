"""Numbers of pairs of pictures, with painters that are known to differ by so much."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from engines.errors import ParityError
from engines.quality_report import Against, page
from export.metrics.pictures import MOST_PSNR_DB, estimate, likeness
from export.quality import AMPLIFIED, compare, report

AGAINST = Against(kind="reference", name="PyTorch fp32", digest="a" * 64)


def scene(seed: int, side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side, :3][:2] / side
    return (127 + 90 * np.sin(6 * x * rng.uniform(0.5, 2) + rng.uniform(0, 6)) * np.cos(5 * y)).astype(np.uint8)


def painter(noise: int, broken: tuple[int, ...] = ()):
    """Draws scene(seed), off by `noise` levels everywhere; scenes of the seeds `broken` are black."""

    def draw(prompts, seed):
        found = [scene(seed + place) + np.uint8(noise) for place in range(len(prompts))]
        return [Image.fromarray(each * 0 if seed + place in broken else each) for place, each in enumerate(found)]

    return draw


@pytest.mark.parametrize("levels", [1, 2, 16])
def test_psnr_is_that_of_the_error(levels):
    [found] = likeness(painter(0)(["a"], 0), painter(levels)(["a"], 0))
    assert found.psnr_db == pytest.approx(20 * np.log10(255 / levels), abs=1e-3)
    assert 0 < found.lpips
    assert found.ssim < 1


def test_equal_pictures():
    pictures = painter(0)(["a", "b"], 0)
    for found in likeness(pictures, pictures):
        assert found.psnr_db == MOST_PSNR_DB == pytest.approx(58.92, abs=0.01)
        assert found.ssim == pytest.approx(1, abs=1e-6)
        assert found.lpips == 0


def test_other_sizes_are_refused():
    with pytest.raises(ParityError, match="expected as many of the same size"):
        likeness(painter(0)(["a"], 0), [Image.new("RGB", (96, 64))])


def test_every_pair_has_the_same_prompt_and_seed_and_the_worst_come_first():
    calls = {0: [], 1: []}
    seen = []

    def noted(which, draw):
        return lambda prompts, seed: (calls[which].append((tuple(prompts), seed)), draw(prompts, seed))[1]

    prompts = [f"prompt {number}" for number in range(5)]
    first, second = noted(0, painter(0)), noted(1, painter(3, broken=(107,)))
    found = compare(
        first, second, prompts, num_seeds=2, seed=100, rows=3, look=lambda places, a, b: seen.extend(zip(places, a, b, strict=True))
    )
    assert calls[0] == calls[1]
    assert found.lpips.shape == (5, 2)
    assert [place for place, _, _ in seen] == [0, 1, 2, 3, 4] * 2
    assert np.unravel_index(found.lpips.argmax(), (5, 2)) == (2, 1)  # seed 107 is the third prompt, second time
    assert found.worst[0].seed == 107
    values = [shown.likeness.lpips for shown in found.worst]
    assert values == sorted(found.lpips.flatten(), reverse=True)[:3]

    section, files = report(found, against=AGAINST, name="int8", backend="a test")
    assert section.rows[0].prompt == "prompt 2"
    assert files["quality/index.html"] == page(section).encode()
    assert set(files) == {"quality/index.html", *(f"quality/{name}" for row in section.rows for name in row.pictures)}
    shown = np.array(Image.open(io.BytesIO(files["quality/001-difference.png"])))
    assert (shown == 3 * AMPLIFIED).all()
    assert (section.prompts, section.seeds) == (5, 2)
    assert section.lpips.mean == found.lpips.mean()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.floats(-100, 100)))
def test_an_interval_is_within_the_values_and_the_same_each_time(values):
    found = estimate(values)
    assert found == estimate(values)
    assert values.min() - 1e-9 <= found.low <= found.high <= values.max() + 1e-9
    assert found.mean == values.mean()


@pytest.mark.slow
def test_an_interval_covers_the_truth_nineteen_times_of_twenty():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        found = estimate(5 + rng.standard_normal((40, 1)) + 0.5 * rng.standard_normal((40, 2)))
        hits += found.low <= 5 <= found.high
    assert hits >= 50  # 57 expected; fewer than 50 has a chance under 1 in 1000


def test_pictures_of_a_prompt_are_no_new_prompts():
    """Ten seeds of the same picture say no more than one."""
    values = np.random.default_rng(1).standard_normal((30, 1))
    one, many = estimate(values), estimate(np.repeat(values, 10, axis=1))
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1)


@pytest.mark.parametrize("values", [np.zeros((0, 1)), np.zeros(3), np.array([[np.nan]])])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match="expected"):
        estimate(values)
