"""Ways to run the same training step faster, chosen by measurement (`train.probe`).

An option is a word: "eager" (the modules as they are), "truth" (linear attention as plain PyTorch rather than the custom op),
"compiled" (each block through torch.compile, convolutions by cuDNN) and "shifted" (compiled, with the depth-wise convolution
written as nine shifted products, which the compiler fuses: cuDNN's backward of a 16-bit depth-wise convolution is slow). All
compute the same function.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_ref import ops
from sana_ref.layers import GLUMBConv
from sana_ref.text_encoder import Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel

OPTIONS = ("eager", "truth", "compiled", "shifted")
_OP = ops.relu_linear_attention
_op_works = True  # until `forbid_op`


def depthwise_shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1, groups=C) for weight (C, 1, 3, 3), summed in fp32. x: (B, C, h, w)."""
    height, width = x.shape[2:]
    padded, taps = F.pad(x, (1, 1, 1, 1)).float(), weight.float()
    total = bias.float()[:, None, None].expand(x.shape)
    for row in range(3):
        for column in range(3):
            total = total + padded[:, :, row : row + height, column : column + width] * taps[:, 0, row, column, None, None]
    return total.to(x.dtype)


def _shifted_forward(self: nn.Conv2d, x: Tensor) -> Tensor:
    return depthwise_shifted(x, self.weight, self.bias)


def _one_hot_forward(self: nn.Embedding, ids: Tensor) -> Tensor:
    rows = ids[..., None] == torch.arange(self.num_embeddings, device=ids.device)
    return rows.to(self.weight.dtype) @ self.weight


def use_attention(*, truth: bool) -> None:
    """Let the models call plain PyTorch instead of the op `sana::relu_linear_attention`, or the op again. For the whole process."""
    ops.relu_linear_attention = ops.relu_linear_attention_truth if truth or not _op_works else _OP


def forbid_op() -> None:
    """The op's kernel was found not to work on this machine: plain PyTorch from now on, whatever is asked for."""
    global _op_works
    _op_works = False
    use_attention(truth=True)


def one_hot_embedding(text_encoder: Gemma2Encoder) -> None:
    """The embedding as a product with one-hot rows: its gradient is then a matrix product, summed in fp32 and the same every
    time, where the embedding's own adds bf16 numbers in any order (and sorts on the way, which a graph may not capture).
    """
    text_encoder.embed_tokens.forward = types.MethodType(_one_hot_forward, text_encoder.embed_tokens)  # type: ignore[method-assign]


def prepare(transformer: SanaTransformer2DModel, text_encoder: Gemma2Encoder, option: str) -> None:
    """Switch the modules, in place, to an option; the embedding as in `one_hot_embedding`."""
    if option not in OPTIONS:
        raise ValueError(f"option: got {option!r}; expected one of {OPTIONS}")
    use_attention(truth=option != "eager")
    one_hot_embedding(text_encoder)
    if option == "shifted":
        for part in transformer.modules():
            if isinstance(part, GLUMBConv):
                part.conv_depth.forward = types.MethodType(_shifted_forward, part.conv_depth)  # type: ignore[method-assign]
    if option in ("compiled", "shifted"):
        torch._dynamo.config.cache_size_limit = 64  # one entry a bucket for each class of block
        for block in (*transformer.transformer_blocks, *text_encoder.layers):
            block.compile(dynamic=False)


def restore(transformer: SanaTransformer2DModel, text_encoder: Gemma2Encoder) -> None:
    """Undo `prepare`: plain modules, as they are evaluated and exported."""
    use_attention(truth=False)
    for part in (*transformer.modules(), *text_encoder.modules()):
        part.__dict__.pop("forward", None)
        part._compiled_call_impl = None
