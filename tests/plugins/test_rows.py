"""How a row of channels is divided."""

import pytest
import triton
from hypothesis import given
from hypothesis import strategies as st

from plugins.rows import MAX_WARPS, head_and_tail, num_warps


@pytest.mark.parametrize(
    ("dim", "head", "tail"),
    [
        (1, 1, 0),
        (16, 16, 0),
        (33, 32, 1),
        (1152, 1024, 128),
        (1536, 1024, 512),
        (1600, 2048, 0),
        (2240, 2048, 256),
        (5600, 4096, 2048),
    ],
)
def test_sizes(dim, head, tail):
    assert head_and_tail(dim) == {"HEAD": head, "TAIL": tail}


@given(st.integers(1, 2**20))
def test_all_channels_are_in_powers_of_two_and_few_elements_more(dim):
    head, tail = head_and_tail(dim).values()
    assert head & (head - 1) == 0
    assert tail & (tail - 1) == 0
    assert dim <= head + tail <= triton.next_power_of_2(dim)
    assert tail == 0 or head < dim


def test_no_channels():
    with pytest.raises(ValueError, match="got rows of 0 channels; expected at least 1"):
        head_and_tail(0)


@pytest.mark.parametrize(("dim", "channels", "warps"), [(1, 40, 1), (1152, 40, 1), (2240, 40, 2), (1152, 20, 2), (2240, 20, 4)])
def test_warps(dim, channels, warps):
    assert num_warps(dim, channels) == warps


def test_most_warps():
    assert num_warps(10**6, 20) == MAX_WARPS
