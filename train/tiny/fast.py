"""How training runs the modules: the same functions as in evaluation, in forms that are faster or that a CUDA graph may hold."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sana_ref import ops
from sana_ref.layers import RMSNorm
from sana_ref.text_encoder import Gemma2Encoder
from train.tiny.loop import Log

TOLERANCE = 0.02  # of a kernel in bf16 against PyTorch in bf16, relative; 0.003 was seen on an H100


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let the models of this process call plain PyTorch instead of the op `sana::relu_linear_attention`. sana-tiny's transformer
    was trained so: 16 steps of 512 scenes a second on an H100, as CUDA graphs.
    """
    op = ops.relu_linear_attention
    ops.relu_linear_attention = ops.relu_linear_attention_truth
    try:
        yield
    finally:
        ops.relu_linear_attention = op


def _one_hot_forward(self: nn.Embedding, ids: Tensor) -> Tensor:
    rows = ids[..., None] == torch.arange(self.num_embeddings, device=ids.device)
    return rows.to(self.weight.dtype) @ self.weight


def one_hot_embedding(text_encoder: Gemma2Encoder) -> None:
    """The embedding as a product with one-hot rows: its gradient is then a matrix product, summed in fp32 and the same every
    time, where the embedding's own adds bf16 numbers in any order (and sorts on the way, which a graph may not capture).
    """
    text_encoder.embed_tokens.forward = types.MethodType(_one_hot_forward, text_encoder.embed_tokens)  # type: ignore[method-assign]


def norm_kernel(model: nn.Module, device: torch.device) -> None:
    """On a GPU let every RMSNorm of `model` run as the kernels of `train.tiny.fast_norm`."""
    if device.type == "cuda":
        from train.tiny.fast_norm import install  # imports Triton

        install(model)


def check_kernels(device: torch.device, log: Log) -> None:
    """Compare the Triton kernels (linear attention, norm), forward and backward, with PyTorch on this GPU.

    Raises RuntimeError if one differs by more than rounding.
    """
    from train.tiny.fast_norm import install

    generator = torch.Generator(device).manual_seed(0)

    def compare(name: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, wanted, strict=True))
        log(f"{name}: kernel differs from PyTorch by {worst:.4f}")
        if not worst < TOLERANCE:
            raise RuntimeError(f"{name}: got a kernel that differs from PyTorch by {worst:.4f}; expected at most {TOLERANCE}")

    q, k, v, grad = (torch.randn(4, 4, 64, 32, device=device, generator=generator).bfloat16().requires_grad_() for _ in range(4))

    def attend(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = f(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    compare("linear attention", attend(ops.relu_linear_attention), attend(ops.relu_linear_attention_truth))

    x = torch.randn(4, 64, 32, 32, device=device, generator=generator).bfloat16()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = RMSNorm(64, bias=True, axis=1).to(device, torch.bfloat16)

    def normed() -> tuple[Tensor, ...]:
        out = norm(x)
        return (out, *torch.autograd.grad(out, (x, *norm.parameters()), x.detach().roll(1, 0)))

    wanted = normed()
    install(norm)
    compare("norm", normed(), wanted)
