"""Convolutions of more numbers than 32 bits count, as a decode of 4096 px has, some rows at a time.

PyTorch's decode beside an engine's did not end in 110 s on an H200. Its tensors have 2^31 elements and more, for which cuDNN may
have no fast kernel: that this is the reason is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ConvolutionsByRows"]

MOST = 2**30  # elements of a part's input and of its output


class ConvolutionsByRows(TorchFunctionMode):
    """`with ConvolutionsByRows(): model(x)`: a large 2-D convolution is computed some rows at a time, the others as they are.

    Every output is the same sum. Only of stride and dilation 1, as all large ones of DC-AE are.
    """

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self._most = most

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.conv2d:
            return func(*args, **kwargs)
        return _convolved(self._most, func, *args, **kwargs)


def _convolved(
    most: int,
    conv2d: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> Tensor:
    """input: (B, C, H, W). The arguments of torch.nn.functional.conv2d."""
    batch, channels, height, width = input.shape
    largest = batch * max(channels, weight.shape[0]) * height * width
    above, beside = (padding, padding) if isinstance(padding, int | str) else padding
    kernel = weight.shape[2]
    dense = stride in (1, (1, 1)) and dilation in (1, (1, 1))
    if largest <= most or not dense or isinstance(above, str) or above >= kernel:  # the last: rows of nothing but padding
        return conv2d(input, weight, bias, stride, padding, dilation, groups)
    out_height = height + 2 * above - kernel + 1
    rows = max(1, most * height // largest)
    parts = []
    for start in range(0, out_height, rows):
        stop = min(start + rows, out_height)
        first, last = start - above, stop - above + kernel - 1  # of the input, beyond which it is 0
        part = input[:, :, max(first, 0) : min(last, height)]
        part = F.pad(part, (0, 0, max(-first, 0), max(last - height, 0)))
        parts.append(conv2d(part, weight, bias, 1, (0, beside), 1, groups))
    return torch.cat(parts, dim=2)
