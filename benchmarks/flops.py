"""Floating-point operations of Sana's transformer, counted from the operators that a forward pass calls."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from sana_ref import ops  # noqa: F401  registers the custom op
from sana_ref.build import empty
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig

__all__ = ["forward_flops", "operator_flops", "peak_flops", "training_flops"]

# Dense bf16 on tensor cores, FLOP/s, by what the driver calls the card. Source: NVIDIA's H100 and H200 data sheets (SXM; the
# sheets print twice as much, with sparsity).
PEAK = {"H100": 989.4e12, "H200": 989.4e12}
PASSES = 3  # forward; the backward pass multiplies each matrix product twice (PaLM, arXiv:2204.02311, appendix B)


@register_flop_formula(torch.ops.sana.relu_linear_attention)  # type: ignore[untyped-decorator]
def _relu_linear_attention(q: tuple[int, ...], *_: Any, **__: Any) -> int:
    """State k^T v and numerator q S: two products of N x D x D a head; the normaliser: two of N x D."""
    batch, heads, tokens, dim = q
    return batch * heads * (2 * 2 * tokens * dim * dim + 2 * 2 * tokens * dim)


def operator_flops(config: SanaTransformerConfig, *, batch: int, height: int, width: int, tokens: int) -> dict[str, int]:
    """Of a forward pass, by operator, the largest first. A multiply and an add are two. height, width: latent cells; tokens: of a
    text. Norms and activations are not counted, as is usual for model FLOP utilisation.
    """
    model = empty(lambda: SanaTransformer2DModel(config))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(
            torch.empty(batch, config.in_channels, height, width),
            torch.empty(batch, tokens, config.caption_channels),
            torch.empty(batch),
            torch.empty(batch, tokens),
            torch.empty(batch) if config.guidance_embeds else None,
        )
    counts = {str(operator): int(count) for operator, count in counter.get_flop_counts()["Global"].items()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def forward_flops(config: SanaTransformerConfig, *, batch: int, height: int, width: int, tokens: int) -> int:
    """The sum of operator_flops."""
    return sum(operator_flops(config, batch=batch, height=height, width=width, tokens=tokens).values())


def training_flops(config: SanaTransformerConfig, *, batch: int, height: int, width: int, tokens: int) -> int:
    """Of a forward and a backward pass. What checkpointing computes again is not counted."""
    return PASSES * forward_flops(config, batch=batch, height=height, width=width, tokens=tokens)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a card in bf16, None if it is not in the table."""
    return next((peak for name, peak in PEAK.items() if name in device_name), None)
