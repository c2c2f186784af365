"""Layers that the transformer and the autoencoder share.

Parameter names are those of the published diffusers checkpoints. Precision is diffusers' too: statistics of a norm in fp32, its
weight applied in the weight's own type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref import gated_conv_ops

__all__ = ["GLUMBConv", "RMSNorm", "fuse_feed_forward"]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight [+ bias], over one axis.

    x, y: any shape with `num_channels` along `axis`: -1 for tokens (B, N, C), 1 for pictures (B, C, h, w).
    The mean is fp32; a 16-bit weight makes the result 16-bit, an fp32 weight (mixed-precision training) makes it fp32.
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-5, bias: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.eps = eps
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self._over(self.axis, x)

    def channels_last(self, x: Tensor) -> Tensor:
        """The same over the last axis, whatever `axis` is: for pictures (B, h, w, C)."""
        return self._over(-1, x)

    def _over(self, axis: int, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(axis, keepdim=True) + self.eps)
        x = x * scale
        if self.weight.dtype != torch.float32:
            x = x.to(self.weight.dtype)
        # (C,) for tokens; (C, 1, 1) for pictures
        to_axis = (slice(None),) + (None,) * (0 if axis == -1 else x.ndim - 1 - axis)
        x = x * self.weight[to_axis]
        return x if self.bias is None else x + self.bias[to_axis]


class GLUMBConv(nn.Module):
    """Sana's Mix-FFN: 1x1 conv to 2c, SiLU, depth-wise 3x3, gate one half with the SiLU of the other, 1x1 conv back.

    The depth-wise convolution is also what tells the transformer where a token lies: most variants have no position embedding.
    x and result: (B, C, h, w). With `norm` an RMSNorm over channels follows and x is added (DC-AE); without, neither (transformer).
    `fused`, of channels_last: the middle is the op `sana::gated_depthwise_conv`, the 1x1 convolutions are matrix
    products, and parameters are the same. So engines and GPUs are fastest: pictures are views of tokens, and nothing is copied.
    Source: Sana, arXiv:2410.10629, section 2.2.
    """

    fused = False

    def __init__(self, num_channels: int, *, expand_ratio: float, norm: bool) -> None:
        super().__init__()
        inner = int(expand_ratio * num_channels)
        self.conv_inverted = nn.Conv2d(num_channels, 2 * inner, 1)
        self.conv_depth = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.conv_point = nn.Conv2d(inner, num_channels, 1, bias=False)
        self.norm = RMSNorm(num_channels, bias=True, axis=1) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        y = self.conv_point(y * F.silu(gate))
        return y if self.norm is None else self.norm(y) + x

    def channels_last(self, x: Tensor) -> Tensor:
        """The same for x and result (B, h, w, C)."""
        if not self.fused:
            return self(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rows = x.flatten(0, 2)  # a matrix: cuBLAS adds the bias in the same kernel
        wide = F.linear(rows, self.conv_inverted.weight.flatten(1), self.conv_inverted.bias).unflatten(0, x.shape[:3])
        assert self.conv_depth.bias is not None
        taps = self.conv_depth.weight.flatten(1).T.unflatten(0, (3, 3))
        gated = gated_conv_ops.gated_depthwise_conv(wide, taps, self.conv_depth.bias)
        y = F.linear(gated.flatten(0, 2), self.conv_point.weight.flatten(1)).unflatten(0, x.shape[:3])
        return y if self.norm is None else self.norm.channels_last(y) + x


def fuse_feed_forward(model: nn.Module) -> int:
    """Let the transformer's mix-FFNs be computed as `fused`, in place. Returns how many there are.

    An autoencoder has none: its own have a norm, and pictures with the channels first (but for sana_ref.fused_decoder).
    """
    layers = [module for module in model.modules() if isinstance(module, GLUMBConv) and module.norm is None]
    for layer in layers:
        layer.fused = True
    return len(layers)
