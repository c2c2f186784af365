"""What enters the transformer's blocks: patches (with a position or without), time (with a guidance scale or without), text.

Nothing here is a buffer: sinusoids are recomputed in the forward pass, so a model built on the meta device is complete as soon as
its parameters are assigned, and picture sizes stay free when it is exported.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CaptionProjection", "PatchEmbed", "TimeEmbed", "TimeGuidanceEmbed"]

TIME_CHANNELS = 256  # width of the sinusoid that the time's MLP reads
MAX_PERIOD = 10000


def frequencies(half: int, device: torch.device) -> Tensor:
    """(half,) fp32, 10000^(-i/half), the exponent in fp32 as published.

    exp is taken in fp64 and rounded: fp32 exponentials differ in the last bit from library to library, an exporter folds this into
    a constant with another one than PyTorch's, and times up to 1000 magnify that bit.
    """
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=device) / half
    return exponent.double().exp().float()


def timestep_sinusoid(values: Tensor) -> Tensor:
    """values (B,) -> (B, 256) fp32, [cos | sin] of values * 10000^(-i/128)."""
    half = TIME_CHANNELS // 2
    angles = values.float()[:, None] * frequencies(half, values.device)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def axis_sinusoid(num_cells: int, span: float, num_channels: int, device: torch.device) -> Tensor:
    """(num_cells, num_channels) fp32, [sin | cos] of p * 10000^(-i/(num_channels/2)), where p runs evenly over [0, span).

    The span does not depend on num_cells: another size of picture samples the same plane more finely or more coarsely.
    """
    half = num_channels // 2
    position = torch.arange(num_cells, dtype=torch.float32, device=device) * span / num_cells
    angles = position[:, None] * frequencies(half, device)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PatchEmbed(nn.Module):
    """(B, C, h, w) -> (B, N, D) tokens in row-major order, N = (h/p)(w/p); adds a fixed 2-D sinusoid if `span` is given.

    `span`: extent of the coordinates along either side, sample_size / patch_size / interpolation_scale (2K and 4K models); None: no
    position. The first D/2 channels encode the column, the others the row. Added in fp32, returned in the convolution's type.
    """

    def __init__(self, in_channels: int, dim: int, *, patch_size: int, span: float | None) -> None:
        super().__init__()
        self.dim = dim
        self.span = span
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.proj(latents)
        tokens = x.flatten(2).transpose(1, 2)
        if self.span is None:
            return tokens
        height, width = x.shape[-2:]
        column = axis_sinusoid(width, self.span, self.dim // 2, x.device)[None].expand(height, -1, -1)
        row = axis_sinusoid(height, self.span, self.dim // 2, x.device)[:, None].expand(-1, width, -1)
        return (tokens + torch.cat([column, row], dim=-1).flatten(0, 1)).to(tokens.dtype)


class SinusoidMLP(nn.Module):
    """Linear, SiLU, Linear on a sinusoid of one number per image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(timestep_sinusoid(values).to(dtype))))


class TimeEmbed(nn.Module):
    """The condition that every block shares (adaLN-single): time (B,) -> (B, 6D) for the blocks and (B, D) for the output layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": SinusoidMLP(dim)})  # this nesting is the published one
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if guidance is not None:
            raise ValueError(
                "got guidance; expected None: this model has no guidance_embeds. Guide with a second, unconditional text"
            )
        embedded = self.emb["timestep_embedder"](timestep, dtype)
        return self.linear(F.silu(embedded)), embedded


class TimeGuidanceEmbed(nn.Module):
    """As TimeEmbed, with a second number per image: the guidance scale times `guidance_embeds_scale` (Sprint)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = SinusoidMLP(dim)
        self.guidance_embedder = SinusoidMLP(dim)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if guidance is None:
            raise ValueError(
                "got no guidance; expected (B,), guidance scale x guidance_embeds_scale: this model has guidance_embeds"
            )
        embedded = self.timestep_embedder(timestep, dtype) + self.guidance_embedder(guidance, dtype)
        return self.linear(F.silu(embedded)), embedded


class CaptionProjection(nn.Module):
    """Text embeddings (B, L, caption_channels) -> (B, L, D): Linear, tanh-GELU, Linear."""

    def __init__(self, caption_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
