"""What each process of the tests does: trains a small transformer for some steps, as `torchrun` would start it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.parallel import checkpoint
from train.parallel.wrap import clip_grad_norm, no_sync, per_process, process_group, wrap

CONFIG = SanaTransformerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=24,
)
BATCH, ACCUMULATION = 8, 2


def make_model() -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(CONFIG)


def picture_batch(step: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randn(shape, generator=generator) for shape in ((BATCH, 4, 4, 4), (BATCH, 4, 4, 4), (BATCH, 7, 24)))


def train(strategy: str, steps: range, *, resume: Path | None, save_to: Path | None, asynchronous: bool, out: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as mesh:
        model = wrap(make_model(), strategy, mesh, bf16=False)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if resume is not None:
            checkpoint.load(resume, model, optimizer)
        share = per_process(BATCH, world_size, ACCUMULATION)
        losses = []
        for step in steps:
            x, target, text = (t.view(ACCUMULATION, world_size, share, *t.shape[1:])[:, rank] for t in picture_batch(step))
            total = torch.zeros(())
            for micro in range(ACCUMULATION):
                with no_sync(model, last=micro == ACCUMULATION - 1):
                    loss = F.mse_loss(model(x[micro], text[micro], torch.full((share,), 500.0)), target[micro]) / ACCUMULATION
                    loss.backward()
                total += loss.detach()
            clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.distributed.all_reduce(total)
            losses.append(float(total) / world_size)
        if save_to is not None:
            if asynchronous:
                checkpoint.save_async(save_to, model, optimizer)()
            else:
                checkpoint.save(save_to, model, optimizer)
        sharded = sum(isinstance(p, DTensor) for p in model.parameters())
        if rank == 0:
            out.write_text(json.dumps({"losses": losses, "sharded": sharded}))


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    paths = {name: Path(options[name]) if options.get(name) else None for name in ("resume", "save_to", "out")}
    train(options["strategy"], range(*options["steps"]), asynchronous=options.get("asynchronous", False), **paths)  # type: ignore[arg-type]
