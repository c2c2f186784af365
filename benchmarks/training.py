"""How fast the transformer trains on latents, next to diffusers' model in the same loop, and how exact it is.

    python benchmarks/training.py --variant sana_1600m_1024px --batches 16,32 --compile blocks --feed-forward plain,fused --record

Weights are random, fp32, with bf16 autocast; a step is the project's objective, clipping at 1 and its AdamW, without a moving
average. First the bf16 velocity is held to twice the error that diffusers' model makes in the same autocast against fp32; if it
is further off, nothing is timed and the exit code is 1. Then every combination of the settings that are lists is timed (medians of
whole steps), and diffusers' model at the best of them: in smaller batches, as many pictures a step, where it needs more memory. The
first loss of each must be the one without compilation.

FLOPs are counted from operators (benchmarks/flops.py), and model FLOP utilisation is their rate over the card's dense bf16 peak.
What weighs besides matrix products is memory traffic. Per step, whatever the batch, 4 B numbers for each weight: AdamW moves 28 B,
clipping 12 B, the bf16 copies 12 B, 25 ms for 1.6 billion weights at 3.3 TB/s, hence larger batches. Per picture: norms, gates and
the depth-wise convolution, which compilation merges. Without a GPU it runs too, for tests: no utilisation then.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from benchmarks.figures import record
from benchmarks.flops import PASSES, operator_flops, peak_flops
from benchmarks.training_step import (
    OBJECTIVE,
    TEXT_TOKENS,
    Batch,
    Step,
    attention,
    autocast,
    drawn,
    ours,
    predict,
    prepare,
    random_batch,
    release,
    theirs,
    timed,
    velocity,
)  # fmt: skip
from engines.errors import SpecError
from sana_ref.transformer import SanaTransformerConfig
from sana_ref.variants import VARIANTS
from train.objective.flow import flow_loss
from train.parallel.reckoning import activation_bytes

WARM_UP = 3
EXACTNESS_BATCH = 2  # pictures
LOSS_TOLERANCE = 0.01  # of a compiled model's first loss, relative: bf16 rounds at 0.004, and a mean of many errs less
STATE_BYTES = 4 + 4 + 8 + 2  # a weight's: fp32, its gradient, AdamW's moments, autocast's bf16 copy


@dataclass(frozen=True, kw_only=True)
class Settings:
    """batch: pictures a step. compile: none, each transformer block as the trainer does, or the whole model. attention: the op
    sana::relu_linear_attention, or its meaning in PyTorch, which the compiler merges with what is around it. feed_forward: as it
    is, with its 1x1 convolutions as matrix products, or those with one op between, as the trainer's fast_feed_forward.
    accumulation: batches a step."""

    batch: int
    accumulation: int = 1
    compile: str = "none"
    attention: str = "op"
    feed_forward: str = "plain"
    checkpointing: bool = False

    def __str__(self) -> str:
        recomputed = ", checkpointing" if self.checkpointing else ""
        times = f" x {self.accumulation}" if self.accumulation > 1 else ""
        return (
            f"batch {self.batch}{times}, compile {self.compile}, attention {self.attention}, "
            f"feed-forward {self.feed_forward}{recomputed}"
        )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """step_s: the median. parts_s: of one step, each part waited for. first_s: until the compiled model had made a step."""

    step_s: float
    first_s: float
    parts_s: Mapping[str, float]
    peak_gb: float


@dataclass(kw_only=True)
class Found:
    """rms_error: of a velocity, by model. timings and failures: by settings. peer: diffusers' timing at the best of them."""

    rms_error: dict[str, float] = field(default_factory=dict)
    timings: dict[Settings, Timing] = field(default_factory=dict)
    failures: dict[Settings, str] = field(default_factory=dict)
    peer: Timing | str | None = None

    @property
    def best(self) -> Settings:
        """The fastest per picture."""
        return min(self.timings, key=lambda each: self.timings[each].step_s / (each.batch * each.accumulation))


def rms_errors(config: SanaTransformerConfig, batch: Batch, attentions: Sequence[str], *, peer: bool) -> dict[str, float]:
    """Of the velocity in bf16 autocast, relative to the root mean square of the one in fp32, by model."""
    device = batch["latents"].device
    model = ours(config, device)
    exact = predict(model, batch)

    def error(model: nn.Module) -> float:
        with autocast(device):
            got = predict(model, batch)
        return float(((got - exact).square().mean() / exact.square().mean()).sqrt())

    found = {}
    for name in attentions:
        with attention(name):
            found[name] = error(model)
    del model
    return found | ({"diffusers": error(theirs(config, device))} if peer else {})


def print_kernels(step: Step, most: int = 25) -> None:
    """Where one step's time on the GPU goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        timed(step, step.device)
    kernels = [event for event in profile.key_averages() if event.device_type.name == "CUDA"]
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:most]:
        print(f"    {event.self_device_time_total / 1e3:8.2f} ms  {event.count:5} x  {event.key[:100]}")


def time_settings(make: Callable[[], nn.Module], batch: Batch, settings: Settings, *, steps: int, profile: bool = False) -> Timing:
    """Raises torch.OutOfMemoryError, or SpecError if the compiled model has another loss."""
    device = batch["latents"].device
    release(device)
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high")  # what is fp32 within a bf16 run is computed in TF32, as train.run does
    model = make()
    with torch.no_grad(), autocast(device):
        expected = float(flow_loss(velocity(model), batch, drawn(batch), OBJECTIVE))
    prepare(model, compile=settings.compile, checkpointing=settings.checkpointing, feed_forward=settings.feed_forward)
    step = Step(model, batch, settings.accumulation)
    first = timed(step, device)
    if not abs(float(step.loss) - expected) <= LOSS_TOLERANCE * abs(expected):
        raise SpecError(f"{settings}: got a first loss of {float(step.loss):.5f}; expected {expected:.5f}, as without compilation")
    for _ in range(WARM_UP - 1):
        timed(step, device)
    median = statistics.median(timed(step, device) for _ in range(steps))
    parts = {part.__name__: timed(part, device) for part in (step.passes, step.clip, step.update)}
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    if profile and device.type == "cuda":
        print_kernels(step)
    return Timing(step_s=median, first_s=first, parts_s=parts, peak_gb=peak)


def measure(
    config: SanaTransformerConfig,
    candidates: Sequence[Settings],
    *,
    side: int,
    device: torch.device,
    steps: int,
    peer: bool,
    tokens: int = TEXT_TOKENS,
    limit_s: float = float("inf"),
    profile: bool = False,
    log: Callable[[str], None] = print,
) -> Found:
    """Errors, then the candidates one after the other, until limit_s have gone by, then diffusers' model at the best of them."""
    began = time.monotonic()
    found = Found()

    def say(text: str) -> None:
        log(f"{time.monotonic() - began:5.0f} s: {text}")

    torch.set_float32_matmul_precision("highest")
    small = random_batch(config, EXACTNESS_BATCH, side, device, tokens=tokens)
    names = sorted({settings.attention for settings in candidates})
    found.rms_error = rms_errors(config, small, names, peer=peer)
    say(f"error in bf16 {found.rms_error}")
    if peer and max(found.rms_error[name] for name in names) > 2 * found.rms_error["diffusers"]:
        return found

    def attempt(name: str, settings: Settings) -> Timing | str:
        batch = random_batch(config, settings.batch, side, device, tokens=tokens)
        try:
            with attention(settings.attention):
                make = ours if name == "ours" else theirs
                timing = time_settings(lambda: make(config, device), batch, settings, steps=steps, profile=profile)
        except torch.OutOfMemoryError:
            return "out of memory"
        parts = ", ".join(f"{name} {1e3 * part:.1f}" for name, part in timing.parts_s.items())
        rate = settings.batch * settings.accumulation / timing.step_s
        say(
            f"{name}, {settings}: {1e3 * timing.step_s:.1f} ms, {rate:.2f} pictures/s, "
            f"{timing.peak_gb:.1f} GB; {parts} ms; first step {timing.first_s:.0f} s"
        )
        return timing

    for settings in candidates:
        late = found.timings and time.monotonic() - began > limit_s
        result = "not tried: --limit-s has gone by" if late else attempt("ours", settings)
        if isinstance(result, Timing):
            found.timings[settings] = result
        else:
            found.failures[settings] = result
            say(f"ours, {settings}: {result}")
    if peer and found.timings:
        settings = replace(found.best, attention="its own", feed_forward="plain")
        found.peer = attempt("diffusers", settings)
        while isinstance(found.peer, str) and settings.batch % 2 == 0:
            say(f"diffusers, {settings}: {found.peer}")
            settings = replace(settings, batch=settings.batch // 2, accumulation=settings.accumulation * 2)
            found.peer = attempt("diffusers", settings)
    release(device)
    return found


def combinations(
    batches: Sequence[int],
    compiles: Sequence[str] = ("none",),
    attentions: Sequence[str] = ("op",),
    feed_forwards: Sequence[str] = ("plain",),
    checkpointing: bool = False,
    accumulation: int = 1,
) -> Iterator[Settings]:
    for how, kind, feed_forward, batch in itertools.product(compiles, attentions, feed_forwards, batches):
        yield Settings(
            batch=batch,
            accumulation=accumulation,
            compile=how,
            attention=kind,
            feed_forward=feed_forward,
            checkpointing=checkpointing,
        )


def choices(*allowed: str) -> Callable[[str], list[str]]:
    """For argparse: names between commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"got {', '.join(wrong)}; expected some of {', '.join(allowed)}, with commas between")
        return names

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="sana_1600m_1024px")
    batches = lambda text: [int(size) for size in text.split(",")]  # noqa: E731  argparse names it in its message
    parser.add_argument("--batches", type=batches, default=[8], help="pictures at once, with commas between; default 8")
    parser.add_argument("--accumulation", type=int, default=1, help="batches a step; default 1")
    parser.add_argument("--side", type=int, help="px; default: the side that the variant was trained for")
    parser.add_argument("--steps", type=int, default=8, help="timed steps; default 8")
    parser.add_argument("--compile", type=choices("none", "blocks", "model"), default=["none"], help="default none")
    parser.add_argument("--attention", type=choices("op", "plain"), default=["op"], help="ours; default op")
    parser.add_argument(
        "--feed-forward", type=choices("plain", "matmul", "fused"), default=["plain"], help="ours: the mix-FFN; default plain"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute the blocks again in the backward pass")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step of each")
    parser.add_argument("--limit-s", type=float, default=100.0, help="begin no further settings after that long; default 100")
    parser.add_argument("--no-peer", action="store_true", help="without diffusers, and without the check against it")
    parser.add_argument("--record", action="store_true", help="append train_…_mfu to benchmarks/results/figures.jsonl")
    args = parser.parse_args()
    # The sizes of a step's tensors differ by thousands: segments that grow leave fewer gaps. Read when a GPU is first used.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes stay, and the depth-wise convolution has slow algorithms too
        torch.backends.cudnn.allow_tf32 = False  # the exact prediction is fp32
    variant = VARIANTS[args.variant]
    config, side = variant.transformer, (args.side or variant.side) // 32

    operators = operator_flops(config, batch=1, height=side, width=side, tokens=TEXT_TOKENS)
    flops = PASSES * sum(operators.values())
    print(f"{flops / 1e12:.3f} TFLOP a picture, both passes:")
    print("\n".join(f"    {PASSES * count / 1e12:8.4f} {name}" for name, count in operators.items()))
    shape = {"batch": 1, "height": side, "width": side, "tokens": TEXT_TOKENS}
    kept = activation_bytes(config, **shape, checkpointing=args.checkpointing) / 1e9
    print(f"memory: {STATE_BYTES * variant.num_parameters / 1e9:.1f} GB and, without compilation, {kept:.2f} GB a picture")

    candidates = list(
        combinations(args.batches, args.compile, args.attention, args.feed_forward, args.checkpointing, args.accumulation)
    )
    options = {"steps": args.steps, "limit_s": args.limit_s, "profile": args.profile}
    try:
        found = measure(config, candidates, side=side, device=device, peer=not args.no_peer, **options)
    except SpecError as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    if not found.timings:
        print("nothing was timed: " + ("nothing fitted" if found.failures else "the model is not exact enough"))
        return 1
    best = found.best
    step_flops = best.batch * best.accumulation * flops
    ours_s, rate = found.timings[best].step_s, step_flops / found.timings[best].step_s
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    share = "no peak is known" if peak is None else f"{rate / peak:.1%} of the peak"
    print(f"best: {best}: {1e3 * ours_s:.1f} ms, {rate / 1e12:.1f} TFLOP/s, {share}")
    if args.record:
        if peak is None:
            print("--record: got no card whose peak is known; nothing was recorded")
            return 1
        size = round(variant.num_parameters / 1e8) * 100
        peers = {}
        note = f"{32 * side} px, {best}, {step_flops / 1e12:.1f} TFLOP a step, random weights; {ours_s:.3f} s a step"
        if isinstance(found.peer, Timing):
            peers["diffusers"] = round(step_flops / found.peer.step_s / peak, 5)
            note += f", diffusers {found.peer.step_s:.3f} s"
        elif found.peer is not None:
            note += f"; diffusers: {found.peer}"
        record(f"train_{size}m_mfu", rate / peak, "share", peer=peers, note=note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
