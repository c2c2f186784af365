"""A convolution by rows is the convolution."""

import pytest
import torch
from torch import nn

from benchmarks.large_convolutions import ConvolutionsByRows


@pytest.mark.parametrize("most", [1, 150, 700, 10**6])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, padding=(2, 0)),
        nn.Conv2d(4, 6, 3, padding=4),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    ],
    ids=str,
)
def test_the_same_sums(conv: nn.Conv2d, most: int) -> None:
    conv, x = conv.double(), torch.randn(2, conv.in_channels, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = conv(x)
    with ConvolutionsByRows(most):
        torch.testing.assert_close(conv(x), wanted, rtol=1e-13, atol=1e-13)


def test_large_ones_are_in_parts_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    x, small = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 4, 4)
    with ConvolutionsByRows(32):
        conv = nn.Conv2d(2, 2, 3, padding=1)
        monkeypatch.setattr("benchmarks.large_convolutions._convolved", _watched(seen))
        conv(x)
        conv(small)
    assert seen == [(1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 4, 4)]


def _watched(seen: list[tuple[int, ...]]):
    from benchmarks.large_convolutions import _convolved

    def watching(most, conv2d, *arguments, **words):
        def watched(part, *others):
            seen.append(tuple(part.shape))
            return conv2d(part, *others)

        return _convolved(most, watched, *arguments, **words)

    return watching
