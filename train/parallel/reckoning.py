"""Where a training run's memory goes, and so whether DDP will do or the state must be sharded.

Bytes are counted, not guessed: the state from the parameters, the activations from the tensors that a forward pass keeps for the
backward pass, with fake tensors, which cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sana_ref.build import empty
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.parallel.wrap import Strategy

__all__ = ["Reckoning", "activation_bytes", "reckon"]

# fp32 weights are updated; two moments of the optimizer in fp32, or in a byte each with a scale for every 256 of them.
MOMENT_BYTES: Mapping[str, float] = {"adamw": 8, "adamw8bit": 2 * (1 + 4 / 256), "came": 4}  # CAME: one moment, factored squares
MASTER, GRADIENT, EMA, HALF = 4, 4, 4, 2
SHARDED = ("adamw",)  # work on a share of a tensor as on the whole: CAME factors it, bitsandbytes quantizes blocks of it
USABLE = 0.90  # of a GPU's memory: the rest is for the allocator's gaps, NCCL and the libraries


@dataclass(frozen=True, kw_only=True)
class Reckoning:
    """Bytes on each GPU, by what holds them, for the strategy that was chosen."""

    strategy: Strategy
    world_size: int
    memory: int  # of a GPU
    parts: Mapping[str, int]
    remedies: tuple[str, ...] = ()  # if it does not fit

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.memory

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [f"  {name:22} {size / 1e9:8.2f} GB" for name, size in (*self.parts.items(), ("together", self.total))]
        head = f"{self.strategy} on {self.world_size} GPU{'s' * (self.world_size > 1)} of {self.memory / 1e9:.0f} GB:"
        return "\n".join([head, *rows])


def _kept_bytes(config: SanaTransformerConfig, batch: int, height: int, width: int, tokens: int) -> int:
    """Of the tensors that a bf16 forward pass keeps for the backward pass, each storage once, parameters left out."""
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no storage's address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    # Fake tensors of the CPU: its fused attention keeps what a GPU's does, and not the scores as the meta device's.
    with FakeTensorMode():
        model = _in_bf16(config)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(
                torch.empty(batch, config.in_channels, height, width, dtype=torch.bfloat16),
                torch.empty(batch, tokens, config.caption_channels, dtype=torch.bfloat16),
                torch.empty(batch),
                torch.empty(batch, tokens),
                torch.empty(batch) if config.guidance_embeds else None,
            )
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


def _in_bf16(config: SanaTransformerConfig) -> SanaTransformer2DModel:
    """Made in bf16 from the start: fake parameters cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return SanaTransformer2DModel(config)
    finally:
        torch.set_default_dtype(before)


def activation_bytes(
    config: SanaTransformerConfig, *, batch: int, height: int, width: int, tokens: int, checkpointing: bool
) -> int:
    """Bytes that live between the forward and the backward pass of one micro-batch, without compilation (which keeps fewer).

    height, width: latent cells; tokens: of a text. checkpointing: a block keeps its input and computes the rest again, so that
    one block's worth is alive at a time.
    """
    shapes = (batch, height, width, tokens)
    one, two = (_kept_bytes(replace(config, num_layers=n), *shapes) for n in (1, 2))
    block, ends = two - one, one - (two - one)
    if not checkpointing:
        return ends + config.num_layers * block
    return ends + block + config.num_layers * batch * (height * width // config.patch_size**2) * config.dim * HALF


def reckon(
    config: SanaTransformerConfig,
    *,
    world_size: int,
    memory: int,
    batch: int,
    height: int,
    width: int,
    tokens: int,
    optimizer: str = "adamw",
    ema: bool = True,
    checkpointing: bool = False,
    accumulation: int = 1,
    strategy: Strategy | Literal["auto"] = "auto",
) -> Reckoning:
    """Count what each GPU holds, and choose: one process alone, DDP if a whole copy fits, otherwise FSDP2.

    world_size: GPUs. memory: bytes of each. batch: pictures in a micro-batch on each GPU, of which a step has `accumulation`.
    strategy: as told, whether it fits or not, or auto. Raises ValueError if nothing fits, with what would help, for an optimizer
    that is not known, or one that cannot work on shares.
    """
    if optimizer not in MOMENT_BYTES:
        raise ValueError(f"optimizer: got {optimizer!r}; expected one of {', '.join(MOMENT_BYTES)}")
    if strategy == "fsdp2" and optimizer not in SHARDED:
        raise ValueError(
            f"parallel: got fsdp2 with {optimizer}; expected {', '.join(SHARDED)}, or ddp: {optimizer} needs whole tensors"
        )
    if strategy == "single" and world_size > 1:
        raise ValueError(f"parallel: got single with {world_size} processes; expected ddp, fsdp2 or auto")
    activations = activation_bytes(config, batch=batch, height=height, width=width, tokens=tokens, checkpointing=checkpointing)
    model = empty(lambda: SanaTransformer2DModel(config))
    weights = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters())

    def of(chosen: Strategy) -> Reckoning:
        share = world_size if chosen == "fsdp2" else 1
        state = {
            "weights, fp32": MASTER * weights,
            "gradients": GRADIENT * weights,
            "optimizer state": round(MOMENT_BYTES[optimizer] * weights),
            "EMA": EMA * weights if ema else 0,
        }
        parts = {name: -(-size // share) for name, size in state.items() if size}
        # FSDP2 gathers a block in bf16 while the one before still computes; DDP's autocast holds a bf16 copy of every matrix, and
        # its buckets are views of the gradients.
        parts["bf16 copies"] = 2 * HALF * block if chosen == "fsdp2" else HALF * weights
        if chosen == "fsdp2" and accumulation > 1:
            parts["gradients not yet summed"] = GRADIENT * weights  # over the processes, which happens once a step
        parts["activations"] = activations
        found = Reckoning(strategy=chosen, world_size=world_size, memory=memory, parts=parts)
        return found if found.fits else replace(found, remedies=remedies(chosen))

    def remedies(chosen: Strategy) -> tuple[str, ...]:
        found = ["a smaller micro-batch"] + ([] if checkpointing else ["activation checkpointing"])
        found += ["adamw8bit"] if optimizer == "adamw" else []
        found += ["fsdp2"] if chosen == "ddp" and strategy == "ddp" and optimizer in SHARDED else []
        found += ["adamw, which can be sharded"] if chosen == "ddp" and optimizer not in SHARDED else []
        return (*found, "more GPUs") if chosen != "ddp" else tuple(found)

    if strategy != "auto":
        return of(strategy)
    candidates: tuple[Strategy, ...] = ("single",) if world_size == 1 else ("ddp", "fsdp2") if optimizer in SHARDED else ("ddp",)
    reckonings = [of(each) for each in candidates]
    if (fitting := next((each for each in reckonings if each.fits), None)) is not None:
        return fitting
    raise ValueError(
        f"parallel: got a run that needs more than {USABLE:.0%} of a GPU's memory; expected less. "
        f"Try {', '.join(reckonings[-1].remedies)}.\n{reckonings[-1]}"
    )
