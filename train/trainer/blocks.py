"""What is done to the blocks that repeat within a model, before anything wraps it. The names of the parameters stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sana_ref.layers import fuse_feed_forward
from train.trainer.errors import TrainingError

__all__ = ["checkpoint_activations", "compile_blocks", "fast_feed_forward"]

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


def fast_feed_forward(model: nn.Module, *, required: bool = True) -> None:
    """Let the mix-FFNs of the transformer run their middle as one op, and their 1x1 convolutions as matrix products.

    Raises TrainingError if a model has none, though it is required.
    """
    if not fuse_feed_forward(model) and required:
        raise TrainingError(f"fast_feed_forward: {type(model).__name__} has no mix-FFN without a norm. Set it to false.")


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks, in place: each kind is compiled once, in seconds where a whole model takes minutes."""
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    # The compiler asks a block's input for its gradient, and PyTorch warns whoever does: nobody is helped by that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for module in blocks or [model]:
        module.compile(dynamic=False)
