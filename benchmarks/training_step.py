"""One training step of the transformer or of diffusers', for the benchmarks: random weights and data, the project's objective."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from engines.errors import SpecError
from sana_ref import ops
from sana_ref.build import empty
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.objective.flow import Draw, draw, flow_loss
from train.objective.place import Place
from train.objective.settings import ObjectiveSettings
from train.trainer.blocks import fast_feed_forward
from train.trainer.optimizer import make_optimizer
from train.trainer.settings import OptimizerSettings

TEXT_TOKENS = 300
OBJECTIVE = ObjectiveSettings()
OPTIMIZER = OptimizerSettings(lr=1e-5)

Batch = Mapping[str, Tensor]


def random_batch(
    config: SanaTransformerConfig, size: int, side: int, device: torch.device, *, tokens: int = TEXT_TOKENS, seed: int = 0
) -> Batch:
    """latents (B, C, side, side), prompt_embeds (B, L, caption_channels), prompt_mask (B, L): a third of it is text."""
    generator = torch.Generator(device).manual_seed(seed)
    latents = torch.randn(size, config.in_channels, side, side, generator=generator, device=device)
    text = torch.randn(size, tokens, config.caption_channels, generator=generator, device=device)
    mask = (torch.arange(tokens, device=device) < max(1, tokens // 3)).float().expand(size, -1).contiguous()
    return {"latents": latents, "prompt_embeds": text, "prompt_mask": mask}


def random_weights(config: SanaTransformerConfig, device: torch.device) -> dict[str, Tensor]:
    """fp32, scaled by fan-in so that activations stay near 1. The same at every call."""
    generator = torch.Generator(device).manual_seed(1)
    state = {}
    for name, tensor in empty(lambda: SanaTransformer2DModel(config)).state_dict().items():
        weight = torch.randn(tensor.shape, generator=generator, device=device)
        fan_in = tensor.shape[-1] if name.endswith("scale_shift_table") else tensor.shape[1:].numel()
        norm = "norm" in name and name.endswith("weight")
        state[name] = torch.ones_like(weight) if norm else weight * (0.02 if tensor.ndim == 1 else fan_in**-0.5)
    return state


def ours(config: SanaTransformerConfig, device: torch.device) -> SanaTransformer2DModel:
    model = empty(lambda: SanaTransformer2DModel(config))
    model.load_state_dict(random_weights(config, device), assign=True)
    return model.requires_grad_(True).train()


def theirs(config: SanaTransformerConfig, device: torch.device) -> nn.Module:
    """diffusers' model of the same config, with the same weights."""
    from diffusers import SanaTransformer2DModel as Diffusers

    with torch.device("meta"):
        model = Diffusers.from_config(asdict(config))
    model.load_state_dict(random_weights(config, device), assign=True)
    for module in model.modules():  # what is no parameter was made on the meta device too: positions
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise SpecError(
                    f"--variant: diffusers' {type(module).__name__} of this one has a table of positions ({name}), which is not "
                    "carried over; expected a variant without. Use --no-peer"
                )
    return model.requires_grad_(True).train()


def velocity(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Either model as the objective calls it."""

    def call(latents: Tensor, text: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        out = model(latents, text, timestep, encoder_attention_mask=mask)
        return out if isinstance(out, Tensor) else out.sample

    return call


def drawn(batch: Batch, step: int = 0, rank: int = 0) -> Draw:
    latents = batch["latents"]
    return draw(OBJECTIVE, tuple(latents.shape), Place(seed=0, step=step, rank=rank), latents.device)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Tensor:
    """The velocity that the objective asks for, fp64."""
    caught: list[Tensor] = []

    def call(*inputs: Tensor) -> Tensor:
        caught.append(velocity(model)(*inputs))
        return caught[0]

    flow_loss(call, batch, drawn(batch), OBJECTIVE)
    return caught[0].double()


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """op: the models call sana::relu_linear_attention. plain: its meaning in PyTorch instead."""
    op = ops.relu_linear_attention
    if name == "plain":
        ops.relu_linear_attention = ops.relu_linear_attention_truth
    try:
        yield
    finally:
        ops.relu_linear_attention = op


def _pointwise_as_product(self: nn.Conv2d, x: Tensor) -> Tensor:
    weight = self.weight.flatten(1)
    return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)


def pointwise_as_products(model: nn.Module) -> None:
    """In place: 1x1 convolutions, half of the model's FLOPs, as cuBLAS's matrix products, forward and backward. Tokens come with
    the channels last already, so that nothing is copied."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            module.forward = types.MethodType(_pointwise_as_product, module)  # type: ignore[method-assign]


def prepare(model: nn.Module, *, compile: str, checkpointing: bool, feed_forward: str = "plain") -> None:
    """In place, as the trainer does; blocks have the same name in both models."""
    if feed_forward == "matmul":
        pointwise_as_products(model)
    elif feed_forward == "fused":
        fast_feed_forward(model)
    blocks = cast(nn.ModuleList, model.transformer_blocks)
    if checkpointing:
        for block in blocks:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    if compile != "none":
        # The compiler asks a block's input for its gradient, and PyTorch warns whoever does: nobody is helped by that.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        for module in [model] if compile == "model" else blocks:
            module.compile(dynamic=False)


class Step:
    """One training step, in its parts: `accumulation` passes over the batch, then an update. Noise is new in every pass, as in a
    run."""

    def __init__(self, model: nn.Module, batch: Batch, accumulation: int = 1) -> None:
        self.model, self.batch, self.accumulation = model, batch, accumulation
        self.device = batch["latents"].device
        self.parameters = list(model.parameters())
        self.optimizer = make_optimizer(OPTIMIZER, model)
        self.numbers = itertools.count()
        self.loss = torch.zeros(())

    def passes(self) -> None:
        for number in range(self.accumulation):
            random = drawn(self.batch, next(self.numbers))
            with autocast(self.device):
                loss = flow_loss(velocity(self.model), self.batch, random, OBJECTIVE)
            (loss / self.accumulation).backward()
            if number == 0:
                self.loss = loss.detach()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.passes()
        self.clip()
        self.update()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, waited for."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
