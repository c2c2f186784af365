"""How fast the transformer trains on latents, next to diffusers' model in the same loop, and how exact it is.

    python benchmarks/training.py --variant sana_1600m_1024px --batch 8 --compile --record

Weights are random, fp32, with bf16 autocast, AdamW and gradient clipping: a flow-matching step from latents to new weights. First
the bf16 prediction is held to twice the error that diffusers' model makes in the same autocast against fp32; if it is further off,
nothing is timed and the exit code is 1. Then medians of whole steps. FLOPs are counted from operators (benchmarks/flops.py), and
model FLOP utilisation is their rate over the card's dense bf16 peak. Without a GPU it runs too, for tests: no utilisation then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.figures import record
from benchmarks.flops import peak_flops, training_flops
from engines.errors import SpecError
from sana_ref.build import empty
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from sana_ref.variants import VARIANTS

WARM_UP = 4
TEXT_TOKENS = 300


@dataclass(frozen=True, kw_only=True)
class Batch:
    """latents, noise (B, C, h, w); text (B, L, caption_channels); mask (B, L); t (B,), 0 to 1."""

    latents: Tensor
    noise: Tensor
    text: Tensor
    mask: Tensor
    t: Tensor

    @classmethod
    def random(cls, config: SanaTransformerConfig, size: int, side: int, device: torch.device, tokens: int = TEXT_TOKENS) -> Batch:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        mask = (torch.arange(tokens, device=device) < tokens // 3).float().expand(size, -1).contiguous()
        t = torch.rand(size, generator=generator, device=device)
        picture = (size, config.in_channels, side, side)
        return cls(
            latents=normal(*picture), noise=normal(*picture), text=normal(size, tokens, config.caption_channels), mask=mask, t=t
        )

    @property
    def noisy(self) -> Tensor:
        t = self.t[:, None, None, None]
        return (1 - t) * self.latents + t * self.noise


def random_weights(config: SanaTransformerConfig, device: torch.device) -> dict[str, Tensor]:
    """fp32, scaled by fan-in so that activations stay near 1."""
    generator = torch.Generator(device).manual_seed(1)
    state = {}
    for name, tensor in empty(lambda: SanaTransformer2DModel(config)).state_dict().items():
        weight = torch.randn(tensor.shape, generator=generator, device=device)
        fan_in = tensor.shape[-1] if name.endswith("scale_shift_table") else tensor.shape[1:].numel()
        norm = "norm" in name and name.endswith("weight")
        state[name] = torch.ones_like(weight) if norm else weight * (0.02 if tensor.ndim == 1 else fan_in**-0.5)
    return state


def ours(config: SanaTransformerConfig, weights: dict[str, Tensor]) -> nn.Module:
    model = empty(lambda: SanaTransformer2DModel(config))
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return model.requires_grad_(True).train()


def theirs(config: SanaTransformerConfig, weights: dict[str, Tensor]) -> nn.Module:
    """diffusers' model of the same config, with the same weights."""
    from diffusers import SanaTransformer2DModel as Diffusers

    with torch.device("meta"):
        model = Diffusers.from_config(asdict(config))
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    for module in model.modules():  # what is no parameter was made on the meta device too: positions
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise SpecError(
                    f"--variant: diffusers' {type(module).__name__} of this one has a table of positions ({name}), which is not "
                    "carried over; expected a variant without. Use --no-peer"
                )
    return model.requires_grad_(True).train()


def predict(model: nn.Module, batch: Batch, timestep_scale: float = 1000.0) -> Tensor:
    out = model(batch.noisy, batch.text, batch.t * timestep_scale, encoder_attention_mask=batch.mask)
    return out if isinstance(out, Tensor) else out.sample


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def rms_error(model: nn.Module, batch: Batch, exact: Tensor) -> float:
    """Of the velocity in bf16 autocast, relative to the root mean square of the exact one."""
    with autocast(batch.t.device):
        got = predict(model, batch)
    return float(((got.double() - exact.double()).square().mean() / exact.double().square().mean()).sqrt())


def make_step(model: nn.Module, batch: Batch, *, compiled: bool) -> Callable[[], None]:
    """One training step: loss, gradients, clipping at 1, AdamW."""
    device = batch.t.device
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")

    def loss_of(batch: Batch) -> Tensor:
        with autocast(device):
            velocity = predict(model, batch)
        return F.mse_loss(velocity.float(), batch.noise - batch.latents)

    call = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        call(batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def median_s(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Of whole steps, each waited for."""
    times = []
    for number in range(WARM_UP + steps):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(config: SanaTransformerConfig, batch: Batch, *, steps: int, compiled: bool, peer: bool) -> dict[str, Any]:
    """Errors, then seconds a step of both models, one after the other, so that they do not share the memory."""
    device = batch.t.device
    weights = random_weights(config, device)
    makers = {"ours": ours} | ({"diffusers": theirs} if peer else {})
    with torch.no_grad():
        exact = predict(ours(config, weights), batch)
    found: dict[str, Any] = {"rms_error": {name: rms_error(make(config, weights), batch, exact) for name, make in makers.items()}}
    if peer and found["rms_error"]["ours"] > 2 * found["rms_error"]["diffusers"]:
        return found
    for name, make in makers.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
        found[f"{name}_s"] = median_s(make_step(make(config, weights), batch, compiled=compiled), device, steps)
        if device.type == "cuda":
            found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    size, _, height, width = batch.latents.shape
    found["flops"] = training_flops(config, batch=size, height=height, width=width, tokens=batch.text.shape[1])
    found["flops_per_s"] = found["flops"] / found["ours_s"]
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    found["mfu"] = None if peak is None else found["flops_per_s"] / peak
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="sana_1600m_1024px")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step; default 8")
    parser.add_argument("--side", type=int, help="px; default: the side that the variant was trained for")
    parser.add_argument("--steps", type=int, default=10, help="timed steps; default 10")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for both models")
    parser.add_argument("--no-peer", action="store_true", help="without diffusers, and without the check against it")
    parser.add_argument("--record", action="store_true", help="append train_…_mfu to benchmarks/results/figures.jsonl")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variant = VARIANTS[args.variant]
    side = (args.side or variant.side) // 32
    batch = Batch.random(variant.transformer, args.batch, side, device)
    try:
        found = measure(variant.transformer, batch, steps=args.steps, compiled=args.compile, peer=not args.no_peer)
    except SpecError as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    if "ours_s" not in found:
        print("the model is not exact enough; nothing was timed")
        return 1
    if args.record:
        if found["mfu"] is None:
            print("--record: got no card whose peak is known; nothing was recorded")
            return 1
        size = round(variant.num_parameters / 1e8) * 100
        peers = {"diffusers_s": found["diffusers_s"], "ours_s": found["ours_s"]} if not args.no_peer else {}
        note = f"{args.batch} x {32 * side} px, {found['flops'] / 1e12:.1f} TFLOP a step, compile {args.compile}, random weights"
        record(f"train_{size}m_mfu", found["mfu"], "share", peer={k: round(v, 5) for k, v in peers.items()}, note=note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
