"""What more GPUs give: throughput of DDP and FSDP2 over one GPU's of the same host, and whether they learn the same.

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py --micro-batch 16 --compile blocks --feed-forward fused --record

First process 0 trains alone while the others wait, then all of them with DDP, then with FSDP2, from the same random weights.
Throughput: pictures a second at the same micro-batch on each GPU; its ratio to one GPU's is the scaling. What a step takes longer
than one GPU's is communication that no computation hides.
Loss curves: the same global batches, pictures and noise; one GPU takes the others' shares as further micro-batches. Sums in another
order differ by rounding, and training lets that grow: so one GPU is compared with itself too, its pictures dealt out to
micro-batches in another way, and a curve should differ from one GPU's no more than about that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.figures import FIGURES, record
from benchmarks.training_step import (
    OBJECTIVE,
    TEXT_TOKENS,
    Batch,
    autocast,
    drawn,
    ours,
    prepare,
    random_batch,
    random_weights,
    release,
    timed,
    velocity,
)
from sana_ref.transformer import SanaTransformerConfig
from sana_ref.variants import VARIANTS
from train.objective.flow import Draw, flow_loss
from train.parallel.processes import Processes, process_group
from train.parallel.wrap import Strategy, clip_grad_norm, no_sync, wrap
from train.trainer.optimizer import make_optimizer
from train.trainer.settings import OptimizerSettings

WARM_UP = 3
NUM_BATCHES = 4  # global batches that a curve goes through again and again, so that there is something to learn
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2")
FIGURE_NAMES: Mapping[Strategy, str] = {"ddp": "ddp", "fsdp2": "fsdp"}
OPTIMIZER = OptimizerSettings(lr=1e-4)

Part = tuple[Batch, Draw]  # a micro-batch and what is random in it


@dataclass(frozen=True, kw_only=True)
class Plan:
    """side: latent cells. micro_batch: pictures on a GPU at once. bucket_mb, bf16_gradients: DDP's; None: the trainer's size."""

    config: SanaTransformerConfig
    side: int
    micro_batch: int = 8
    steps: int = 12
    curve_steps: int = 20
    tokens: int = TEXT_TOKENS
    bf16: bool = True
    compile: str = "none"
    feed_forward: str = "plain"
    checkpointing: bool = False
    bucket_mb: float | None = None
    bf16_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """step_s: the slowest process's median. losses: of the curve. other_order: of one GPU with its pictures dealt out otherwise."""

    step_s: float
    losses: Sequence[float]
    peak_gb: float
    other_order: Sequence[float] = ()


def build(plan: Plan, strategy: Strategy, processes: Processes) -> nn.Module:
    model = ours(plan.config, processes.device)
    prepare(model, compile=plan.compile, checkpointing=plan.checkpointing, feed_forward=plan.feed_forward)
    if strategy == "ddp" and plan.bucket_mb is not None:
        ids = [processes.device] if processes.device.type == "cuda" else None
        wrapped: nn.Module = DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, bucket_cap_mb=plan.bucket_mb
        )
    else:
        wrapped = wrap(model, strategy, processes, bf16=plan.bf16)
    if isinstance(wrapped, DistributedDataParallel) and plan.bf16_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def part(plan: Plan, step: int, rank: int, world_size: int, device: torch.device) -> Part:
    """What process `rank` sees in a step of the curves."""
    seed = (step % NUM_BATCHES) * world_size + rank
    batch = random_batch(plan.config, plan.micro_batch, plan.side, device, tokens=plan.tokens, seed=seed)
    return batch, drawn(batch, step, rank)


def dealt_out_otherwise(parts: Sequence[Part]) -> list[Part]:
    """The same pictures with the same noise: each micro-batch gives half of its pictures to the next one."""

    def shifted(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        size = len(tensors[0])
        return torch.cat(list(tensors)).roll(size // 2, 0).split(size)

    batches = {name: shifted([batch[name] for batch, _ in parts]) for name in parts[0][0]}
    random = {name: shifted([getattr(draw, name) for _, draw in parts]) for name in ("t", "noise", "keep")}
    return [
        ({name: tensors[i] for name, tensors in batches.items()}, Draw(**{name: tensors[i] for name, tensors in random.items()}))
        for i in range(len(parts))
    ]


class Run:
    """A model, wrapped or not, and its optimizer."""

    def __init__(self, plan: Plan, model: nn.Module, device: torch.device) -> None:
        self.plan, self.model, self.device = plan, model, device
        self.optimizer = make_optimizer(OPTIMIZER, model)

    def step(self, parts: Sequence[Part]) -> Tensor:
        """One update from all parts together. Returns their mean loss."""
        total = torch.zeros((), device=self.device)
        for i, (batch, draw) in enumerate(parts):
            with no_sync(self.model, last=i == len(parts) - 1):
                with autocast(self.device) if self.plan.bf16 else contextlib.nullcontext():
                    loss = flow_loss(velocity(self.model), batch, draw, OBJECTIVE) / len(parts)
                loss.backward()
            total += loss.detach()
        clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def curve(self, parts_of: Callable[[int], Sequence[Part]]) -> Tensor:
        """Losses of this process."""
        return torch.stack([self.step(parts_of(step)) for step in range(self.plan.curve_steps)])

    def step_s(self) -> float:
        """The median of steps of one micro-batch."""
        batch, draw = part(self.plan, 0, 0, 1, self.device)
        times = [timed(lambda: self.step([(batch, draw)]), self.device) for _ in range(WARM_UP + self.plan.steps)]
        return statistics.median(times[WARM_UP:])


def peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def alone(plan: Plan, world_size: int, device: torch.device) -> Result:
    """This process without the others, which wait."""
    release(device)
    model = build(plan, "single", Processes(device=device))

    def parts_of(step: int) -> list[Part]:
        return [part(plan, step, rank, world_size, device) for rank in range(world_size)]

    losses = Run(plan, model, device).curve(parts_of)
    with torch.no_grad():
        first = random_weights(plan.config, device)
        for name, parameter in model.named_parameters():
            parameter.copy_(first[name])
        del first
    run = Run(plan, model, device)
    other = run.curve(lambda step: dealt_out_otherwise(parts_of(step)))
    return Result(step_s=run.step_s(), losses=losses.tolist(), peak_gb=peak_gb(device), other_order=other.tolist())


def together(plan: Plan, strategy: Strategy, processes: Processes) -> Result:
    device, rank, world_size = processes.device, processes.rank, processes.world_size
    release(device)
    run = Run(plan, build(plan, strategy, processes), device)
    losses = run.curve(lambda step: [part(plan, step, rank, world_size, device)])
    dist.all_reduce(losses)
    dist.barrier()
    slowest = torch.tensor([run.step_s(), peak_gb(device)], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    step_s, memory = slowest.tolist()
    return Result(step_s=step_s, losses=(losses / world_size).tolist(), peak_gb=memory)


def measure(plan: Plan, processes: Processes) -> dict[Strategy, Result]:
    """Called by every process; process 0 has the results, the others all but one GPU's."""
    device = processes.device
    found: dict[Strategy, Result] = {}

    def say(name: Strategy) -> None:
        if processes.rank == 0:
            result = found[name]
            said = f"{1e3 * result.step_s:.1f} ms a step, {result.peak_gb:.1f} GB, last loss {result.losses[-1]:.5f}"
            print(f"{time.monotonic() - began:5.0f} s: {name}: {said}", flush=True)

    began = time.monotonic()
    dist.barrier()  # the connection is made before anyone computes
    if processes.rank == 0:
        found["single"] = alone(plan, processes.world_size, device)
        say("single")
    release(device)
    dist.barrier()
    for strategy in STRATEGIES:
        found[strategy] = together(plan, strategy, processes)
        say(strategy)
    return found


def differences(losses: Sequence[float], expected: Sequence[float]) -> tuple[float, float]:
    """The largest and the root mean square, relative."""
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return max(relative), statistics.fmean(r * r for r in relative) ** 0.5


def report(plan: Plan, found: Mapping[Strategy, Result], world_size: int, results: Path | None) -> None:
    """Print; with a folder, append the figures to its figures.jsonl and write the curves."""
    single = found["single"]
    noise = differences(single.other_order, single.losses)
    one = plan.micro_batch / single.step_s
    print(f"one GPU: {one:.2f} pictures/s; from itself in another order: largest {noise[0]:.2e}, rms {noise[1]:.2e}")
    options = f"compile {plan.compile}, feed-forward {plan.feed_forward}" + (", checkpointing" if plan.checkpointing else "")
    for strategy in STRATEGIES:
        result = found[strategy]
        largest, rms = differences(result.losses, single.losses)
        ratio = world_size * single.step_s / result.step_s
        own = options + "".join(f", {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_"))
        if strategy == "ddp":
            own += ", gradients sent in bf16" if plan.bf16_gradients else ""
            own += f", buckets of {plan.bucket_mb:g} MB" if plan.bucket_mb is not None else ""
        note = (
            f"{world_size} x {plan.micro_batch} x {32 * plan.side} px, {own}: {ratio * one:.2f} pictures/s, one GPU {one:.2f}; "
            f"exposed communication {1e3 * (result.step_s - single.step_s):.1f} ms of a step of {1e3 * result.step_s:.1f} ms; "
            f"{result.peak_gb:.1f} GB; loss of {plan.curve_steps} steps differs from one GPU's by {largest:.1e} at most, "
            f"{rms:.1e} rms; one GPU in another order by {noise[0]:.1e}, {noise[1]:.1e}"
        )
        print(f"{strategy}: scaling {ratio:.3f}: {note}")
        if results is not None:
            name = f"train_scaling_{world_size}gpu_{FIGURE_NAMES[strategy]}"
            record(name, ratio, "ratio", note=note, path=results / FIGURES.name)
    if results is not None:
        curves = {"single": single.losses, "single_other_order": single.other_order} | {str(s): found[s].losses for s in STRATEGIES}
        rounded = {name: [float(f"{loss:.7g}") for loss in losses] for name, losses in curves.items()}
        content = {"global_batch": world_size * plan.micro_batch, "side_px": 32 * plan.side, "losses": rounded}
        (results / f"train_scaling_{world_size}gpu_losses.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="sana_1600m_1024px")
    parser.add_argument("--side", type=int, help="px; default: the side that the variant was trained for")
    parser.add_argument("--micro-batch", type=int, default=8, help="pictures on each GPU; default 8")
    parser.add_argument("--steps", type=int, default=12, help="timed steps; default 12")
    parser.add_argument("--curve-steps", type=int, default=20, help="steps of a loss curve; default 20")
    parser.add_argument("--compile", choices=("none", "blocks"), default="none")
    parser.add_argument("--feed-forward", choices=("plain", "matmul", "fused"), default="plain", help="the mix-FFN; default plain")
    parser.add_argument("--checkpointing", action="store_true", help="compute the blocks again in the backward pass")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the products; default bf16")
    parser.add_argument("--bucket-mb", type=float, help="of DDP's gradients; default: the trainer's")
    parser.add_argument("--bf16-gradients", action="store_true", help="DDP sends gradients in bf16: half the traffic, less exact")
    parser.add_argument("--record", action="store_true", help="append train_scaling_… to figures.jsonl and write the curves")
    parser.add_argument("--results", type=Path, default=FIGURES.parent, help="folder of both; default benchmarks/results")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        print("scaling: got one process; expected several: torchrun --standalone --nproc-per-node 2 …", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True  # the shapes stay, and the depth-wise convolution has slow algorithms too
    variant = VARIANTS[args.variant]
    names = ("micro_batch", "steps", "curve_steps", "compile", "feed_forward", "checkpointing", "bucket_mb", "bf16_gradients")
    plan = Plan(config=variant.transformer, side=(args.side or variant.side) // 32, bf16=args.precision == "bf16")
    plan = replace(plan, **{name: getattr(args, name) for name in names})
    with process_group() as processes:
        found = measure(plan, processes)
    if processes.rank == 0:
        report(plan, found, processes.world_size, args.results if args.record else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
