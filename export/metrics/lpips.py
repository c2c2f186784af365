"""LPIPS, version 0.1, on AlexNet: the distance of two pictures as a network sees them. 0 for equal ones; about 0.1 is visible.

    LPIPS(x, y) = sum over 5 layers of the mean over places of  w . (f(x) / |f(x)| - f(y) / |f(y)|)^2

f: the layer's channels at a place, after its ReLU; w: a weight for each channel, 0 or more, learned from what people called alike.
Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv:1801.03924; the same numbers as
the package `lpips` 0.1.4 (net="alex"), which fetches AlexNet when it runs. The weights are beside this file, in fp16, made by
benchmarks/lpips_weights.py; LPIPS_LICENSE.txt says whose they are.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "MIN_SIDE", "WEIGHTS", "Lpips", "lpips_alex"]

WEIGHTS = Path(__file__).with_name("lpips_alex.safetensors")
CONVOLUTIONS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
POOLED_BEFORE = (1, 2)  # convolutions that read a maximum over 3 x 3, every second place
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for pictures in -1 to 1
EPS = 1e-10  # where a layer is silent
MIN_SIDE = 32  # px: below, AlexNet's pools have nothing left


class Lpips(nn.Module):
    """CONVOLUTIONS: channels in, channels out, kernel, stride, padding. `weights` (the file's tensors) may have any float type."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, kernel, stride, padding) for into, out, kernel, stride, padding in CONVOLUTIONS
        )
        self.linears = nn.ParameterList(torch.zeros(out) for _, out, _, _, _ in CONVOLUTIONS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def layers(self, pictures: Tensor) -> list[Tensor]:
        """Of pictures (B, 3, H, W): each layer's channels, of length 1 at every place."""
        x, found = (pictures - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for index, convolution in enumerate(self.convolutions):
            if index in POOLED_BEFORE:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(convolution(x))
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + EPS))
        return found

    @torch.inference_mode()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) fp32, 0 or more. x, y: (B, 3, H, W) fp32, -1 to 1, RGB, H and W at least MIN_SIDE. Raises ValueError."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"LPIPS: got pictures {tuple(x.shape)} and {tuple(y.shape)}; expected two equal shapes (B, 3, H, W), "
                f"sides at least {MIN_SIDE} px"
            )
        total = x.new_zeros(len(x))
        for weight, a, b in zip(self.linears, self.layers(x), self.layers(y), strict=True):
            total = total + torch.einsum("c,bchw->bhw", weight, (a - b).square()).mean(dim=(1, 2))
        return total


@functools.cache
def lpips_alex(device: str = "cpu") -> Lpips:
    """The network with the weights that ship. It computes in fp32."""
    return Lpips(load_file(WEIGHTS)).float().to(device)
