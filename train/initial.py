"""New weights, as Sana's training begins: blocks near the identity, the predicted velocity at zero.

Source: initialize_weights of the DiT that Sana's training code goes back to (DiT, arXiv:2212.09748, section 3.2: zero-initialised
outputs), with Xavier's uniform matrices elsewhere.
"""

from __future__ import annotations

from torch import nn

from sana_ref.transformer import SanaTransformer2DModel

__all__ = ["initialise"]


def initialise(model: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """In place, from PyTorch's generator; returns the model."""
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in model.named_parameters():
        if name.startswith(("time_embed", "caption_projection")) and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.startswith("proj_out") or ("attn2.to_out" in name and parameter.ndim == 2):
            nn.init.zeros_(parameter)
    return model
