"""DC-AE, the deep-compression autoencoder: a picture to a latent of 1/32 its side and back; deterministic, no KL.

Stages of residual blocks, then stages of linear attention; every change of resolution has a shortcut without parameters that
moves pixels into channels or back. Full (sana-1.0, 1.1) and Lite decoders are configs of one class.
This is what it means; sana_ref/fused_decoder.py is how an engine decodes.
Parameter names are those of diffusers' AutoencoderDC. Source: DC-AE, arXiv:2410.10733.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref import ops
from sana_ref.config import config_from_json, refuse_unless
from sana_ref.layers import GLUMBConv, RMSNorm

__all__ = ["AutoencoderDC", "AutoencoderDCConfig", "MultiscaleLinearAttention", "average_channels", "per_stage", "repeat_channels"]

BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
ACTIVATIONS = {"silu": F.silu, "relu": F.relu}
FACTOR = 2  # each change of resolution halves or doubles the sides


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderDCConfig:
    """Fields of a published vae/config.json, with diffusers' defaults. Tuples: an entry per stage, from the finest."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"  # or "interpolate"
    downsample_block_type: str = "pixel_unshuffle"  # or "conv"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0  # the transformer sees latent x scaling_factor; Sana: 0.41407

    def __post_init__(self) -> None:
        for name, allowed in (
            ("encoder_block_types", BLOCK_TYPES),
            ("decoder_block_types", BLOCK_TYPES),
            ("decoder_norm_types", ("rms_norm",)),
            ("decoder_act_fns", tuple(ACTIVATIONS)),
            ("decoder_conv_act_fn", tuple(ACTIVATIONS)),
            ("upsample_block_type", ("pixel_shuffle", "interpolate")),
            ("downsample_block_type", ("pixel_unshuffle", "conv")),
        ):
            value = getattr(self, name)
            refuse_unless(
                set(per_stage(value, 1)) <= set(allowed),
                f"{name}: got {value!r}; expected only {allowed}, as in the published models",
            )
        for side in ("encoder", "decoder"):
            num_stages = len(getattr(self, f"{side}_block_out_channels"))
            for name in ("block_types", "layers_per_block", "qkv_multiscales"):
                value = getattr(self, f"{side}_{name}")
                refuse_unless(
                    isinstance(value, str) or len(value) == num_stages,
                    f"{side}_{name}: got {value!r}; expected {num_stages} entries, one a stage, as {side}_block_out_channels has",
                )

    @property
    def px_per_latent(self) -> int:
        """Pixels that a latent cell covers along one side: 32 for the published models."""
        return FACTOR ** (len(self.encoder_block_out_channels) - 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From a parsed config.json. Raises SpecError for unknown keys and unsupported values."""
        return config_from_json(cls, values)


class ResBlock(nn.Module):
    """x + RMSNorm(conv(act(conv(x)))). x and result: (B, C, h, w)."""

    def __init__(self, num_channels: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(num_channels, bias=True, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class MultiscaleProjection(nn.Module):
    """q, k and v seen through a k x k window: depth-wise, then mixed within each head's q, k or v. (B, 3C, h, w) to the same."""

    def __init__(self, num_channels: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        wide = 3 * num_channels
        self.proj_in = nn.Conv2d(wide, wide, kernel_size, padding=kernel_size // 2, groups=wide, bias=False)
        self.proj_out = nn.Conv2d(wide, wide, 1, groups=3 * num_heads, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(qkv))


class MultiscaleLinearAttention(nn.Module):
    """x + RMSNorm(ReLU linear attention over pixels), with one more set of heads per kernel size. x and result: (B, C, h, w).

    For at most `head_dim` pixels diffusers multiplies in the other order (k^T q first). That is the same sum, cheaper only for
    pictures of 160 px or so, and a branch on the size would tie an exported graph to one side of it: one order here.
    """

    def __init__(self, num_channels: int, head_dim: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.head_dim = head_dim
        num_heads = num_channels // head_dim
        inner = num_heads * head_dim
        self.to_q = nn.Linear(num_channels, inner, bias=False)
        self.to_k = nn.Linear(num_channels, inner, bias=False)
        self.to_v = nn.Linear(num_channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(inner, num_heads, size) for size in kernel_sizes)
        self.to_out = nn.Linear(inner * (1 + len(kernel_sizes)), num_channels, bias=False)
        self.norm_out = RMSNorm(num_channels, bias=True, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        qkv = torch.cat([qkv, *(project(qkv) for project in self.to_qkv_multiscale)], dim=1)
        # A head is 3 x head_dim neighbouring channels of [q | k | v | multiscale q | k | v], wherever they lie: so it was trained.
        heads = qkv.flatten(2).unflatten(1, (-1, 3 * self.head_dim)).transpose(2, 3)  # (B, H, N, 3D)
        q, k, v = heads.chunk(3, dim=-1)
        out = ops.relu_linear_attention(q, k, v)  # (B, H, N, D)
        out = out.permute(0, 2, 1, 3).flatten(2).unflatten(1, pixels.shape[1:3])  # (B, h, w, H D)
        return x + self.norm_out(self.to_out(out).movedim(-1, 1))


class EfficientViTBlock(nn.Module):
    """Attention between all pixels, then between neighbours. x and result: (B, C, h, w)."""

    def __init__(self, num_channels: int, head_dim: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(num_channels, head_dim, kernel_sizes)
        self.conv_out = GLUMBConv(num_channels, expand_ratio=4, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class DownBlock(nn.Module):
    """(B, C, h, w) -> (B, num_out, h/2, w/2); the shortcut moves 2x2 pixels into channels and averages neighbouring ones."""

    def __init__(self, num_in: int, num_out: int, *, unshuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.group = num_in * FACTOR**2 // num_out if shortcut else None
        if unshuffle:
            self.conv = nn.Conv2d(num_in, num_out // FACTOR**2, 3, padding=1)
        else:
            self.conv = nn.Conv2d(num_in, num_out, 3, stride=FACTOR, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, FACTOR)
        return y if self.group is None else y + average_channels(F.pixel_unshuffle(x, FACTOR), self.group)


class UpBlock(nn.Module):
    """(B, C, h, w) -> (B, num_out, 2h, 2w); the shortcut repeats channels and moves them out to 2x2 pixels."""

    def __init__(self, num_in: int, num_out: int, *, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.repeats = num_out * FACTOR**2 // num_in if shortcut else None
        self.conv = nn.Conv2d(num_in, num_out if interpolate else num_out * FACTOR**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=float(FACTOR), mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), FACTOR)
        return y if self.repeats is None else y + F.pixel_shuffle(repeat_channels(x, self.repeats), FACTOR)


class Encoder(nn.Module):
    """(B, 3, H, W) picture -> (B, latent_channels, H/32, W/32)."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        widths, depths = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        types = per_stage(config.encoder_block_types, len(widths))
        if depths[0] > 0:
            self.conv_in: nn.Module = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        else:  # the first stage is empty: straight to half the resolution
            self.conv_in = DownBlock(config.in_channels, widths[1], unshuffle=unshuffle, shortcut=False)
        stages = []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [
                make_block(types[i], width, config.attention_head_dim, config.encoder_qkv_multiscales[i], "silu")
                for _ in range(depth)
            ]
            if i + 1 < len(widths) and depth > 0:
                blocks.append(DownBlock(width, widths[i + 1], unshuffle=unshuffle))
            stages.append(nn.Sequential(*blocks))
        self.down_blocks = nn.ModuleList(stages)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.group = widths[-1] // config.latent_channels if config.encoder_out_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        latent = self.conv_out(x)
        return latent if self.group is None else latent + average_channels(x, self.group)


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, 32h, 32w) picture, nominally -1 to 1 and not clamped."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        widths, depths = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        types = per_stage(config.decoder_block_types, len(widths))
        activations = per_stage(config.decoder_act_fns, len(widths))
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.repeats = widths[-1] // config.latent_channels if config.decoder_in_shortcut else None
        stages = []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            if i + 1 < len(widths) and depth > 0:
                blocks.append(UpBlock(widths[i + 1], width, interpolate=interpolate))
            blocks += [
                make_block(types[i], width, config.attention_head_dim, config.decoder_qkv_multiscales[i], activations[i])
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
        self.up_blocks = nn.ModuleList(stages)  # from the finest; forward runs them backwards
        last = widths[0] if depths[0] > 0 else widths[1]
        self.norm_out = RMSNorm(last, bias=True, axis=1)
        self.activation = ACTIVATIONS[config.decoder_conv_act_fn]
        if depths[0] > 0:
            self.conv_out: nn.Module = nn.Conv2d(last, config.in_channels, 3, padding=1)
        else:
            self.conv_out = UpBlock(last, config.in_channels, interpolate=interpolate, shortcut=False)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        if self.repeats is not None:
            x = x + repeat_channels(latent, self.repeats)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(self.activation(self.norm_out(x)))


class AutoencoderDC(nn.Module):
    """Picture to latent and back. Neither side applies `scaling_factor`: the transformer sees latent x scaling_factor."""

    def __init__(self, config: AutoencoderDCConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), RGB, -1 to 1, sides multiples of 32 px -> latents (B, latent_channels, H/32, W/32)."""
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, latent_channels, h, w), not scaled -> images (B, 3, 32h, 32w), nominally -1 to 1, not clamped."""
        return self.decoder(latents)

    def forward(self, images: Tensor) -> Tensor:
        """The picture after compression: decode(encode(images))."""
        return self.decode(self.encode(images))


def make_block(kind: str, width: int, head_dim: int, kernel_sizes: tuple[int, ...], activation: str) -> nn.Module:
    if kind == "ResBlock":
        return ResBlock(width, activation)
    return EfficientViTBlock(width, head_dim, kernel_sizes)


def per_stage(value: str | tuple[str, ...], num_stages: int) -> tuple[str, ...]:
    """A setting that a config gives once for all stages, or per stage."""
    return (value,) * num_stages if isinstance(value, str) else value


def average_channels(x: Tensor, group: int) -> Tensor:
    """(B, C, h, w) -> (B, C/group, h, w), the mean of neighbouring channels."""
    return x.unflatten(1, (-1, group)).mean(2)


def repeat_channels(x: Tensor, repeats: int) -> Tensor:
    """(B, C, h, w) -> (B, C repeats, h, w), each channel `repeats` times in a row."""
    return x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)
