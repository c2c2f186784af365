"""Gemma-2 as a text encoder: the decoder's trunk, token ids in, hidden states after the last norm out.

Our own module rather than transformers' Gemma2Model: attention written out (no fused kernel of PyTorch caps the scores), no cache,
no buffers, so that it exports with batch and length free and needs torch alone. Parameter names are transformers'.
Scores, softmax, norms and rotations are fp32 whatever the type of the weights; fp16 weights overflow in between: use bf16 or fp32.
For engines `fuse` makes attention one op (sana_ref/attention_ops.py), and what lies between two products another (norm_ops.py).
Source: Gemma 2, arXiv:2408.00118; Sana uses gemma-2-2b-it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref.attention_ops import causal_attention, rotate
from sana_ref.config import config_from_json, refuse_unless
from sana_ref.norm_ops import normed_sum

__all__ = ["Gemma2Config", "Gemma2Encoder", "fuse"]

Sight = tuple[int | None, Tensor]
BLOCKED = torch.finfo(torch.float32).min  # added to the scores of keys that a query may not see
# What config.json may say about the mathematics and only in this way.
FIXED = {
    "model_type": ("gemma2",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma2Config:
    """Fields of a Gemma-2 config.json that decide the trunk's result. Defaults are those of the 2B model."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: float = 256  # scores are divided by its root
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int | None = 4096  # tokens that a query of a "sliding_attention" layer looks back on, itself included
    layer_types: tuple[str, ...] | None = None  # None: sliding, full, sliding, ...

    def __post_init__(self) -> None:
        refuse_unless(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads: got {self.num_key_value_heads}; expected a divisor of {self.num_attention_heads} query heads",
        )
        refuse_unless(self.head_dim % 2 == 0, f"head_dim: got {self.head_dim}; expected an even number: rotations take pairs")
        types = self.layer_types
        refuse_unless(
            types is None or (len(types) == self.num_hidden_layers and set(types) <= {"sliding_attention", "full_attention"}),
            f"layer_types: got {types}; expected {self.num_hidden_layers} of 'sliding_attention' or 'full_attention'",
        )

    def looks_back(self, layer: int) -> int | None:
        """How many tokens the layer sees, counted back from each token; None: all of them."""
        sliding = layer % 2 == 0 if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From a parsed config.json of transformers.

        Unlike in our other configs unknown keys are skipped: transformers writes dozens that concern generation and output. Those
        that concern the trunk are checked. Raises SpecError for a value that is not Gemma-2's.
        """
        for key, allowed in FIXED.items():
            value = values.get(key, allowed[0])
            refuse_unless(
                value in allowed, f"{key}: got {value!r}; expected {allowed[0]!r}: only Gemma-2 text encoders are supported"
            )
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        refuse_unless(kind == "default", f"rope_type: got {kind!r}; expected 'default', as Gemma-2 has")
        given = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        return config_from_json(cls, given)


class Gemma2RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32, returned in x's type."""

    def __init__(self, num_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


class Gemma2Attention(nn.Module):
    """Causal attention with rotary positions and capped scores; groups of query heads share a key and value head.

    x: (B, S, C); sight: how far a token looks back, and what is added to the scores, (B, 1, G S, S), the same for each of a group's
    G heads. fused: attention is the op sana::causal_attention, and `sight` has (B, S), 0 for padding, in place of what is added.
    """

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.fused = False
        self.num_kv = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv * config.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight) -> Tensor:
        window, bias = sight
        if self.fused:
            assert self.cap is not None
            qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=2)
            sizes = {"num_heads": self.num_kv * self.group, "num_kv_heads": self.num_kv}
            return self.o_proj(causal_attention(qkv, cos, sin, bias, **sizes, scale=self.scale, cap=self.cap, window=window))
        q = self.q_proj(x).unflatten(2, (self.num_kv * self.group, -1)).transpose(1, 2)  # (B, H, S, D)
        k = self.k_proj(x).unflatten(2, (self.num_kv, -1)).transpose(1, 2)  # (B, K, S, D)
        v = self.v_proj(x).unflatten(2, (self.num_kv, -1)).transpose(1, 2)
        # The heads that share a key and value head are rows of one product with it: nothing is repeated in memory.
        rows = rotate(q, cos, sin).unflatten(1, (self.num_kv, self.group)).flatten(2, 3)  # (B, K, G S, D)
        scores = (rows @ rotate(k, cos, sin).mT).float() * self.scale  # (B, K, G S, S)
        if self.cap is not None:
            scores = (scores / self.cap).tanh() * self.cap
        out = (scores + bias).softmax(-1).to(v.dtype) @ v
        out = out.unflatten(2, (self.group, x.shape[1])).flatten(1, 2)  # (B, H, S, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Gemma2MLP(nn.Module):
    """down(gelu(gate x) * up x), tanh GELU."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Gemma2Layer(nn.Module):
    """Attention and MLP, each between two norms and added to its input."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.self_attn = Gemma2Attention(config)
        self.mlp = Gemma2MLP(config)
        self.input_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, sight))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

    def fused(
        self, x: Tensor, normed: Tensor, following: Gemma2RMSNorm, cos: Tensor, sin: Tensor, sight: Sight
    ) -> tuple[Tensor, Tensor]:
        """What forward makes of x, and the norm `following` of that. normed: x behind input_layernorm."""
        branch = self.self_attn(normed, cos, sin, sight)
        x, normed = _added(x, branch, self.post_attention_layernorm, self.pre_feedforward_layernorm)
        return _added(x, self.mlp(normed), self.post_feedforward_layernorm, following)


def _added(x: Tensor, branch: Tensor, own: Gemma2RMSNorm, following: Gemma2RMSNorm) -> tuple[Tensor, Tensor]:
    """x + own(branch), and the norm `following` of that."""
    return normed_sum(x, branch, own.weight, following.weight, own.eps)


class Gemma2Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.fused = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)  # as Gemma; they are multiplied by the root of the width
        self.layers = nn.ModuleList(Gemma2Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states after the final norm, (B, S, hidden_size), in the type of the weights.

        input_ids: (B, S) integers below vocab_size. attention_mask: (B, S), 1 for text and 0 for padding, which is on the right and
        never a whole row. States of padding are defined, and meaningless.
        """
        return self.encode_rows(self.embed_tokens(input_ids), attention_mask)

    def encode_rows(self, rows: Tensor, attention_mask: Tensor) -> Tensor:
        """As forward, of the table's rows (B, S, hidden_size) of the tokens, in the type of the weights and as they are stored."""
        config = self.config
        position = torch.arange(rows.shape[1], device=rows.device)
        cos, sin = rotations(position, config.head_dim, config.rope_theta)
        x = rows * config.hidden_size**0.5
        windows = [config.looks_back(i) for i in range(config.num_hidden_layers)]
        if self.fused:
            live = (attention_mask != 0).to(rows.dtype)
            following = [*(layer.input_layernorm for layer in self.layers), self.norm]
            normed = following.pop(0)(x)
            for layer, window, norm in zip(self.layers, windows, following, strict=True):
                x, normed = layer.fused(x, normed, norm, cos, sin, (window, live))
            return normed
        biases = self._biases(position, attention_mask, windows)
        for layer, window in zip(self.layers, windows, strict=True):
            x = layer(x, cos, sin, (window, biases[window]))
        return self.norm(x)

    def _biases(self, position: Tensor, attention_mask: Tensor, windows: Sequence[int | None]) -> dict[int | None, Tensor]:
        back = position[:, None] - position[None]  # (S, S) how far the key lies behind the query
        visible = (back >= 0) & (attention_mask != 0)[:, None, None]  # (B, 1, S, S)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        return {
            w: blocking_bias(visible if w is None else visible & (back < w)).repeat(1, 1, group, 1) for w in dict.fromkeys(windows)
        }


def fuse(model: nn.Module) -> None:
    """Let attention and norms be computed as an engine is fastest, in place. Meaning and parameters stay; so does a model without a
    cap."""
    for module in model.modules():
        if isinstance(module, Gemma2Encoder) and module.config.attn_logit_softcapping is not None:
            module.fused = True
            for layer in module.layers:
                layer.self_attn.fused = True


def blocking_bias(visible: Tensor) -> Tensor:
    """fp32 of the same shape: 0 where a query may see a key, else so low that its weight is 0."""
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, BLOCKED)


def rotations(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (S, head_dim / 2) fp32 of each token's rotation."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angles = position.float()[:, None] * (1.0 / theta**exponent)[None]
    return angles.cos(), angles.sin()
