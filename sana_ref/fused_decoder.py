"""DC-AE's decoder as an engine is fastest: pictures with the channels last, convolutions and attention as ops.

What it means is sana_ref.autoencoder.Decoder, whose modules, and so parameters, it has. Inside, every picture is (B, h, w, C): 1x1
convolutions are matrix products, a norm reads neighbours in memory, linear attention reads q, k and v where their projections left
them, and nothing is transposed but where pixels and channels change places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref import conv_ops, ops, tap_ops
from sana_ref.autoencoder import (
    ACTIVATIONS,
    FACTOR,
    Decoder,
    EfficientViTBlock,
    MultiscaleLinearAttention,
    MultiscaleProjection,
    ResBlock,
    UpBlock,
)
from sana_ref.layers import GLUMBConv

__all__ = ["HEAD_DIMS", "KERNEL_SIZE", "MAX_NORM", "MAX_OUTPUTS", "FusedDecoder", "in_taps", "of_corners", "one_projection"]

MAX_NORM = 256  # channels, up to which a program of the convolution's kernel has all of a pixel's, and can normalise them
MAX_OUTPUTS = 3  # channels of a picture, up to which the norm and convolution at the end have kernels of their own
HEAD_DIMS, KERNEL_SIZE = (16, 32, 64), 5  # of an attention's other scale, for which there is a kernel
_NAMES = {function: name for name, function in ACTIVATIONS.items()}


class FusedDecoder(nn.Module):
    """`Decoder`, made of the modules of one: the same parameters under the same names, and the same result but for rounding."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.conv_in = decoder.conv_in
        self.repeats = decoder.repeats
        self.up_blocks = decoder.up_blocks
        self.norm_out = decoder.norm_out
        self.activation = decoder.activation
        self.conv_out = decoder.conv_out
        for module in self.modules():
            if isinstance(module, GLUMBConv):
                module.fused = True  # of channels_last, which the unfused decoder does not call

    def forward(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, 32h, 32w) picture, nominally -1 to 1 and not clamped."""
        latent = latent.permute(0, 2, 3, 1)
        x = _conv3x3(self.conv_in, latent)
        if self.repeats is not None:
            x = x + _repeated(latent, self.repeats)
        for stage in reversed(self.up_blocks):
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                x = _block(block, x)
        return self._end(x).permute(0, 3, 1, 2)

    def _end(self, x: Tensor) -> Tensor:
        norm, conv = self.norm_out, self.conv_out
        if isinstance(conv, nn.Conv2d) and in_taps(conv.in_channels, conv.out_channels, _NAMES[self.activation]):
            assert norm.bias is not None
            assert conv.bias is not None
            taps = tap_ops.normed_taps(x, norm.weight, norm.bias, conv.weight.permute(1, 0, 2, 3).flatten(1), norm.eps)
            return tap_ops.tap_sum(taps, conv.bias)
        x = self.activation(norm.channels_last(x))
        return _up(conv, x) if isinstance(conv, UpBlock) else _conv3x3(conv, x)


def _block(block: nn.Module, x: Tensor) -> Tensor:
    """x and result: (B, h, w, C), of an UpBlock (B, 2h, 2w, num_out)."""
    if isinstance(block, UpBlock):
        return _up(block, x)
    if isinstance(block, ResBlock):
        return _residual(block, x)
    assert isinstance(block, EfficientViTBlock)
    return block.conv_out.channels_last(_attention(block.attn, x))


def _conv3x3(conv: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    assert isinstance(conv, nn.Conv2d)
    bias = x.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    return conv_ops.conv3x3(x, conv.weight.permute(0, 2, 3, 1), bias, activation)


def _residual(block: ResBlock, x: Tensor) -> Tensor:
    y = _conv3x3(block.conv1, x, _NAMES[block.activation])
    norm = block.norm
    assert norm.bias is not None
    if block.conv2.out_channels > MAX_NORM:
        return x + norm.channels_last(_conv3x3(block.conv2, y))
    return conv_ops.conv3x3_norm(y, block.conv2.weight.permute(0, 2, 3, 1), x, norm.weight, norm.bias, norm.eps)


def _attention(attention: MultiscaleLinearAttention, x: Tensor) -> Tensor:
    parts = (attention.to_q, attention.to_k, attention.to_v)
    qkv = F.linear(x, torch.cat([part.weight for part in parts]))
    qkv = _with_scales(attention, qkv)
    num_heads = qkv.shape[-1] // (3 * attention.head_dim)
    out = ops.qkv_linear_attention(qkv.flatten(1, 2), num_heads, interleaved=True).unflatten(1, x.shape[1:3])
    return x + attention.norm_out.channels_last(attention.to_out(out))


def in_taps(channels: int, outputs: int, activation: str) -> bool:
    """Whether there are kernels for such an end of a decoder."""
    return activation == "relu" and channels <= MAX_NORM and outputs <= MAX_OUTPUTS


def one_projection(head_dim: int, kernel_sizes: Sequence[int]) -> bool:
    """Whether there is a kernel for an attention's scales."""
    return head_dim in HEAD_DIMS and tuple(kernel_sizes) == (KERNEL_SIZE,)


def _with_scales(attention: MultiscaleLinearAttention, qkv: Tensor) -> Tensor:
    """(B, h, w, 3C) -> (B, h, w, 3C (1 + scales))."""
    projects = list(attention.to_qkv_multiscale)
    assert all(isinstance(project, MultiscaleProjection) for project in projects)
    if one_projection(attention.head_dim, [project.proj_in.kernel_size[0] for project in projects]):
        near, mix = (conv.weight.flatten(1) for conv in (projects[0].proj_in, projects[0].proj_out))
        return conv_ops.multiscale_projection(qkv, near.t(), mix)
    return torch.cat([qkv, *(_multiscale(project, qkv, attention.head_dim) for project in projects)], dim=-1)


def _multiscale(project: MultiscaleProjection, qkv: Tensor, head_dim: int) -> Tensor:
    """(B, h, w, 3C) to the same."""
    near = project.proj_in(qkv.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    groups = near.flatten(0, 2).unflatten(1, (-1, head_dim)).transpose(0, 1)  # (G, B h w, D)
    mix = project.proj_out.weight.flatten(1).unflatten(0, (-1, head_dim)).mT  # (G, D in, D out)
    return (groups @ mix).transpose(0, 1).flatten(1).unflatten(0, qkv.shape[:3])


def _up(block: UpBlock, x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, 2h, 2w, num_out). The op wants a weight's rows by corner of the 2x2: of constants, that is free."""
    bias = block.conv.bias
    assert bias is not None
    if block.interpolate:
        weight, bias = of_corners(block.conv.weight), bias.repeat(FACTOR**2)
    else:
        # From pixel_shuffle's order, in which a channel's 2x2 are side by side.
        weight = block.conv.weight.unflatten(0, (-1, FACTOR**2)).transpose(0, 1).flatten(0, 1)
        bias = bias.unflatten(0, (-1, FACTOR**2)).mT.flatten()
    return conv_ops.conv3x3_upsample(x, weight.permute(0, 2, 3, 1), bias, block.repeats or 0, nearest=block.interpolate)


def of_corners(weight: Tensor) -> Tensor:
    """(N, C, 3, 3) of a convolution of repeated pixels -> (4N, C, 3, 3) of one of the pixels themselves, for each corner.

    Above a repeated pixel's upper half is the pixel above, below it is itself once more: so weights of rows 1 and 2 meet the same
    pixel, and the lower half's of rows 0 and 1. As in rows, so in columns. Sums are fp32.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    corners = [half for rows in _halves(wide, 2) for half in _halves(rows, 3)]
    return torch.cat(corners).to(weight.dtype)


def _halves(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    before, here, after = weight.split(1, dim=axis)
    nothing = torch.zeros_like(here)
    return torch.cat([before, here + after, nothing], dim=axis), torch.cat([nothing, before + here, after], dim=axis)


def _repeated(x: Tensor, repeats: int) -> Tensor:
    """(B, h, w, C) -> (B, h, w, C repeats), each channel `repeats` times in a row."""
    return x if repeats == 1 else x[..., None].expand(-1, -1, -1, -1, repeats).flatten(3)
