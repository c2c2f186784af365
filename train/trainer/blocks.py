"""What is done to the blocks that repeat within a model, before anything wraps it. The names of the parameters stay."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sana_ref.layers import GLUMBConv
from train import ops
from train.trainer.errors import TrainingError

__all__ = ["checkpoint_activations", "compile_blocks", "fast_feed_forward", "has_feed_forward"]

BLOCKS = {"SanaTransformerBlock", "Gemma2Layer", "ResBlock", "EfficientViTBlock"}  # by name: sana_ref offers the whole models


def checkpoint_activations(model: nn.Module) -> None:
    """Let the transformer's blocks be computed again in the backward pass."""
    blocks = getattr(model, "transformer_blocks", None)
    if blocks is None:
        raise TrainingError(f"activation_checkpointing: {type(model).__name__} has no transformer_blocks. Set it to false.")
    for block in blocks:
        block.forward = _twice(block.forward)


def _twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function, which the compiler sees through: it would leave a functools.partial of `recompute` as it is, and all within.
    def forward_again(*arguments: Any) -> Tensor:
        result: Tensor = recompute(forward, *arguments, use_reentrant=False)
        return result

    return forward_again


def _feed_forwards(model: nn.Module) -> list[GLUMBConv]:
    return [module for module in model.modules() if isinstance(module, GLUMBConv) and module.norm is None]


def has_feed_forward(model: nn.Module) -> bool:
    """Whether fast_feed_forward can be used."""
    return bool(_feed_forwards(model))


def fast_feed_forward(model: nn.Module) -> None:
    """Let the mix-FFNs of the transformer run their middle as one op, and their 1x1 convolutions as matrix products.

    Not those with a norm, the autoencoder's: their pictures have the channels first.
    """
    layers = _feed_forwards(model)
    if not layers:
        raise TrainingError(f"fast_feed_forward: {type(model).__name__} has no mix-FFN without a norm. Set it to false.")
    for layer in layers:
        layer.forward = types.MethodType(_fast_feed_forward, layer)  # type: ignore[method-assign]


def _fast_feed_forward(self: GLUMBConv, x: Tensor) -> Tensor:
    """x and result (B, C, h, w): views of tokens, so that nothing is copied."""
    tokens = x.permute(0, 2, 3, 1)
    rows = tokens.flatten(0, 2)  # a matrix: cuBLAS adds the bias in the same kernel
    wide = F.linear(rows, self.conv_inverted.weight.flatten(1), self.conv_inverted.bias)
    assert self.conv_depth.bias is not None
    gated = ops.gated_depthwise_conv(wide.unflatten(0, tokens.shape[:3]), self.conv_depth.weight, self.conv_depth.bias)
    return F.linear(gated.flatten(0, 2), self.conv_point.weight.flatten(1)).unflatten(0, tokens.shape[:3]).permute(0, 3, 1, 2)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks, in place: each kind is compiled once, in seconds where a whole model takes minutes."""
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    # The compiler asks a block's input for its gradient, and PyTorch warns whoever does: nobody is helped by that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for module in blocks or [model]:
        module.compile(dynamic=False)
