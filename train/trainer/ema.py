"""The exponential moving average of the weights, in fp32: what a finished run is drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from train.parallel.wrap import local

__all__ = ["Ema"]


class Ema:
    """Of the trained parameters, by name; of this process's share, if they are shared out. The decay is reached gradually, so
    that the first weights are soon forgotten."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """num_updates: of the weights so far, this one not counted."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        weights = [local(p.detach()).float() for p in self.parameters.values()]
        torch._foreach_lerp_([local(tensor) for tensor in self.average.values()], weights, 1 - decay)

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
