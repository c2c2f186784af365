"""Sana's image transformer. Sizes, Sana-1.5 (norms on q and k) and Sprint (guidance scale as an input) are configs of one class.

Tokens are the cells of the DC-AE latent. A block is linear self-attention, softmax cross-attention to the text and a convolutional
feed-forward; self-attention and feed-forward are modulated by the time (adaLN-single), cross-attention is not.
Parameter names are those of diffusers' SanaTransformer2DModel. Source: Sana, arXiv:2410.10629; Sprint, arXiv:2503.09641.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref import attention_ops, ops
from sana_ref.config import config_from_json, refuse_unless
from sana_ref.embeddings import CaptionProjection, PatchEmbed, TimeEmbed, TimeGuidanceEmbed
from sana_ref.layers import GLUMBConv, RMSNorm, fuse_feed_forward

__all__ = ["BlockText", "KeysValues", "SanaTransformer2DModel", "SanaTransformerConfig", "fuse"]

MASKED = -10000.0  # added to the scores of padding; fits fp16, and exp of it is 0 in every type
FP16_MAX = 65504.0
QK_NORMS = (None, "rms_norm_across_heads")

# Rows of a block's table and of the time. The model's own table has a shift and a scale at its end, in the first two.
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_FF, SCALE_FF, GATE_FF = range(6)

KeysValues = tuple[Tensor, Tensor]  # of a text, for one block: (B, H, L, D / H) each


@dataclass(frozen=True, slots=True)
class BlockText:
    """The keys and values that one block reads, inside those of all blocks, (blocks, k, B, H, L, D / H) each."""

    keys: Tensor
    values: Tensor
    block: int

    def keys_values(self) -> KeysValues:
        """Cut out, the k texts of B pictures as kB."""
        return self.keys[self.block].flatten(0, 1), self.values[self.block].flatten(0, 1)


Text = Tensor | KeysValues | BlockText  # as a block takes it: hidden states (B, L, D), or what was made of them once


@dataclass(frozen=True, kw_only=True, slots=True)
class SanaTransformerConfig:
    """Fields of a published transformer/config.json. Defaults are diffusers' (Sana-1.6B but for sample_size)."""

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32  # latent cells a side at the size the model was trained for
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None  # a number: 2-D sinusoid positions (2K: 1, 4K: 2)
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0  # the sampler multiplies the timestep by this

    def __post_init__(self) -> None:
        refuse_unless(
            self.qk_norm in QK_NORMS, f"qk_norm: got {self.qk_norm!r}; expected one of {QK_NORMS}, which are the published ones"
        )
        refuse_unless(self.dropout == 0, f"dropout: got {self.dropout}; expected 0: no published model has it. Set it to 0.0")
        refuse_unless(
            self.cross_attention_dim == self.dim,
            f"cross_attention_dim: got {self.cross_attention_dim}; expected num_attention_heads x attention_head_dim = {self.dim}, "
            "because the text is projected to the width of the hidden states",
        )
        refuse_unless(
            self.interpolation_scale is None or self.dim % 4 == 0,
            f"interpolation_scale: got {self.interpolation_scale} with a hidden width of {self.dim}; expected a multiple of 4",
        )

    @property
    def dim(self) -> int:
        """Width D of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_out_channels(self) -> int:
        return self.out_channels or self.in_channels

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From a parsed config.json. Raises SpecError for unknown keys and unsupported values."""
        return config_from_json(cls, values)


class LinearAttention(nn.Module):
    """Self-attention with ReLU instead of softmax: cost grows with N, not N^2. x and result: (B, N, D).

    `fused`: one projection for q, k and v, and attention straight from its result, as an engine is fastest; the same parameters.
    """

    fused = False

    def __init__(self, config: SanaTransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_k = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_v = nn.Linear(dim, dim, bias=config.attention_bias)
        self.norm_q = RMSNorm(dim) if config.qk_norm else None
        self.norm_k = RMSNorm(dim) if config.qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            out = self.to_out[0](ops.qkv_linear_attention(self._qkv(x), self.num_heads))
        else:
            q, k, v = self._normalised(self.to_q(x), self.to_k(x), self.to_v(x))
            q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
            out = self.to_out[0](merge_heads(ops.relu_linear_attention(q, k, v)))
        return out.clip(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else out

    def _normalised(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)  # fp32 norms under autocast: the op takes one type
        return q, k, v

    def _qkv(self, x: Tensor) -> Tensor:
        """(B, N, 3 D)."""
        parts = (self.to_q, self.to_k, self.to_v)
        bias = None if self.to_q.bias is None else torch.cat([part.bias for part in parts])
        qkv = F.linear(x, torch.cat([part.weight for part in parts]), bias)
        return qkv if self.norm_q is None else torch.cat(self._normalised(*qkv.chunk(3, dim=-1)), dim=-1)


class CrossAttention(nn.Module):
    """Softmax attention to the text. x and result (B, N, D); bias (B, L) is added to the scores.

    The text is given as hidden states (B, L, D), or as what keys_values makes of them, which is the same at every step.
    `fused`: a BlockText with a bias is read as it lies, by one operator, as an engine is fastest.
    """

    fused = False

    def __init__(self, config: SanaTransformerConfig) -> None:
        super().__init__()
        inner = config.num_cross_attention_heads * config.cross_attention_head_dim
        self.num_heads = config.num_cross_attention_heads
        self.to_q = nn.Linear(config.dim, inner)
        self.to_k = nn.Linear(config.cross_attention_dim, inner)
        self.to_v = nn.Linear(config.cross_attention_dim, inner)
        self.norm_q = RMSNorm(inner) if config.qk_norm else None
        self.norm_k = RMSNorm(inner) if config.qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(inner, config.dim)])

    def keys_values(self, text: Tensor) -> KeysValues:
        k, v = self.to_k(text), self.to_v(text)
        if self.norm_k is not None:
            k = self.norm_k(k).to(v.dtype)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x: Tensor, text: Text, bias: Tensor | None) -> Tensor:
        if isinstance(text, BlockText):
            if self.fused and bias is not None:
                q = self._query(x, text.values.dtype)
                return self.to_out[0](attention_ops.cross_attention(q, text.keys, text.values, bias, text.block))
            text = text.keys_values()
        k, v = self.keys_values(text) if isinstance(text, Tensor) else text
        q = self._query(x, v.dtype)
        # The scale goes to q, in fp32: an exported graph would hold it in half precision, wrong by up to 5e-4 for all scores.
        q = (q.to(torch.promote_types(q.dtype, torch.float32)) * (q.shape[-1] // self.num_heads) ** -0.5).to(v.dtype)
        mask = None if bias is None else bias[:, None, None]
        out = F.scaled_dot_product_attention(split_heads(q, self.num_heads), k, v, attn_mask=mask, scale=1.0)
        return self.to_out[0](merge_heads(out))

    def _query(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N, H D), heads joined, not scaled. dtype: the values', where a norm may return fp32."""
        q = self.to_q(x)
        return q if self.norm_q is None else self.norm_q(q).to(dtype)


class SanaTransformerBlock(nn.Module):
    """h = h + gate * attention(modulated h); h = h + attention to text(h); h = h + gate * feed-forward(modulated h).

    hidden: (B, N, D), N = height x width. text: as CrossAttention takes it. time6: (B, 6D); the block's own table is added to it.
    """

    def __init__(self, config: SanaTransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.attn1 = LinearAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)
        self.attn2 = CrossAttention(config)
        self.ff = GLUMBConv(dim, expand_ratio=config.mlp_ratio, norm=False)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, hidden: Tensor, text: Text, text_bias: Tensor | None, time6: Tensor, height: int, width: int) -> Tensor:
        table = self.scale_shift_table[None] + time6.unflatten(1, (6, -1))
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table.chunk(6, dim=1)
        hidden = hidden + gate_attn * self.attn1(modulate(self.norm1(hidden), shift_attn, scale_attn).to(hidden.dtype))
        hidden = hidden + self.attn2(hidden, text, text_bias)
        picture = modulate(self.norm2(hidden), shift_ff, scale_ff).unflatten(1, (height, width))
        return hidden + gate_ff * self.ff.channels_last(picture).flatten(1, 2)

    def branches(
        self,
        hidden: Tensor,
        normed: Tensor,
        text: Text,
        text_bias: Tensor | None,
        time6: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """As forward, without its first norm and its last sum, which join in one op between two blocks.

        normed: of that first norm, modulated. size: height, width. Returns hidden and the feed-forward's result, without its gate.
        """
        gate = self.scale_shift_table[GATE_ATTN] + time6.unflatten(1, (6, -1))[:, GATE_ATTN, None]
        hidden = hidden + gate * self.attn1(normed)
        hidden, normed = ops.modulated_norm(
            hidden,
            self.attn2(hidden, text, text_bias),
            (time6, self.scale_shift_table),
            None,
            (SHIFT_FF, SCALE_FF),
            eps=self.norm2.eps,
        )
        return hidden, self.ff.channels_last(normed.unflatten(1, size)).flatten(1, 2)


class SanaTransformer2DModel(nn.Module):
    """Predicts the flow velocity noise - image of a latent.

    `fused`: a norm takes the sum before it along, the op `sana::modulated_norm`, as an engine is fastest; the same parameters.
    """

    fused = False

    def __init__(self, config: SanaTransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        scale = config.interpolation_scale
        span = None if scale is None else config.sample_size // patch / scale
        self.patch_embed = PatchEmbed(config.in_channels, dim, patch_size=patch, span=span)
        self.time_embed = TimeGuidanceEmbed(dim) if config.guidance_embeds else TimeEmbed(dim)
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        self.caption_norm = RMSNorm(dim)
        self.transformer_blocks = nn.ModuleList(SanaTransformerBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, patch * patch * config.num_out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity, (B, out_channels, h, w), in the type of the weights.

        hidden_states: (B, in_channels, h, w) latents, in the type of the weights; patch_size divides h and w.
        encoder_hidden_states: (B, L, caption_channels) text, in the type of the weights.
        timestep: (B,), 0 to 1000 (Sprint: 0 to 1), of any type; its sinusoid is fp32.
        encoder_attention_mask: (B, L), 1 for text and 0 for padding; None: no padding.
        guidance: (B,), guidance scale x guidance_embeds_scale; required by models with guidance_embeds,
            refused by the others (ValueError).
        """
        texts = [self.project_text(encoder_hidden_states)] * len(self.transformer_blocks)
        return self.denoise(hidden_states, texts, timestep, encoder_attention_mask, guidance)

    def project_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """(B, L, caption_channels) -> the hidden states (B, L, D) that every block attends to."""
        return self.caption_norm(self.caption_projection(encoder_hidden_states))

    def denoise(
        self,
        hidden_states: Tensor,
        texts: Sequence[Text],
        timestep: Tensor,
        encoder_attention_mask: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """As forward, with the text as each block is to have it."""
        patch = self.config.patch_size
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        hidden = self.patch_embed(hidden_states)
        time6, time = self.time_embed(timestep, guidance, hidden.dtype)
        text_bias = None
        if encoder_attention_mask is not None:
            text_bias = (1 - encoder_attention_mask.to(hidden.dtype)) * MASKED

        if self.fused:
            normed = self._normed(hidden, texts, text_bias, time6, time, (height, width))
        else:
            for block, text in zip(self.transformer_blocks, texts, strict=True):
                hidden = block(hidden, text, text_bias, time6, height, width)
            shift, scale = (self.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
            normed = modulate(self.norm_out(hidden), shift, scale)
        pixels = self.proj_out(normed)  # (B, N, p p C)
        pixels = pixels.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))  # (B, h, w, p, q, C)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _normed(
        self,
        hidden: Tensor,
        texts: Sequence[Text],
        text_bias: Tensor | None,
        time6: Tensor,
        time: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        """All blocks and the last norm, fused: each block's last sum is part of the norm after it."""
        first, *others = self.transformer_blocks
        shift, scale, *_ = (first.scale_shift_table[None] + time6.unflatten(1, (6, -1))).chunk(6, dim=1)
        normed = modulate(first.norm1(hidden), shift, scale)
        after = [(block.norm1.eps, (time6, block.scale_shift_table)) for block in others]
        after.append((self.norm_out.eps, (time, self.scale_shift_table)))
        for block, text, (eps, modulation) in zip(self.transformer_blocks, texts, after, strict=True):
            hidden, branch = block.branches(hidden, normed, text, text_bias, time6, size)
            gate = (time6, block.scale_shift_table)
            hidden, normed = ops.modulated_norm(hidden, branch, modulation, gate, (SHIFT_ATTN, SCALE_ATTN, GATE_FF), eps=eps)
        return normed


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)


def fuse(model: nn.Module) -> None:
    """Let both attentions, mix-FFNs and modulated norms be computed as an engine is fastest, in place.

    The meaning and the parameters stay. Norms with parameters (norm_elementwise_affine) stay as they are, and so do all others of
    such a model: no published one has them.
    """
    fuse_feed_forward(model)
    for module in model.modules():
        if isinstance(module, LinearAttention | CrossAttention):
            module.fused = True
        elif isinstance(module, SanaTransformer2DModel):
            module.fused = not module.config.norm_elementwise_affine
