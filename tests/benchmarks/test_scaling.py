"""The scaling benchmark on two processes of a CPU, which this file is too when torchrun starts it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from sana_ref.transformer import SanaTransformerConfig
from train.parallel.processes import process_group

ROOT = Path(__file__).parents[2]
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
PLAN = scaling.Plan(config=CONFIG, side=4, micro_batch=4, steps=2, curve_steps=6, tokens=7, bf16=False)


def run(out: Path, **changes: object) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, json.dumps(changes)], capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "train_scaling_2gpu_losses.json").read_text())["losses"]


def work(out: Path, changes: dict) -> None:
    torch.set_num_threads(1)
    plan = replace(PLAN, **changes)
    with process_group() as processes:
        found = scaling.measure(plan, processes)
    if processes.rank == 0:
        scaling.report(plan, found, processes.world_size, out)


@pytest.mark.slow
def test_both_learn_what_one_does_and_are_recorded(tmp_path: Path) -> None:
    losses = run(tmp_path)
    single = losses.pop("single")
    assert len({round(loss, 3) for loss in single}) == PLAN.curve_steps
    assert losses.keys() == {"single_other_order", "ddp", "fsdp2"}
    for name, curve in losses.items():
        assert curve == pytest.approx(single, rel=1e-4), name
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [figure["figure"] for figure in figures] == ["train_scaling_2gpu_ddp", "train_scaling_2gpu_fsdp"]
    assert all(figure["value"] > 0 and "exposed communication" in figure["note"] for figure in figures)


@pytest.mark.slow
def test_in_bf16_with_its_options(tmp_path: Path) -> None:
    """Rounding apart; the times, 0 to 1000, must reach the model unrounded."""
    losses = run(tmp_path, bf16=True, bucket_mb=1.0, checkpointing=True)
    for strategy in ("ddp", "fsdp2"):
        assert losses[strategy] == pytest.approx(losses["single"], rel=5e-3), strategy


def test_another_order_has_the_same_pictures() -> None:
    parts = [scaling.part(PLAN, 0, rank, 2, torch.device("cpu")) for rank in (0, 1)]
    other = scaling.dealt_out_otherwise(parts)
    for name in ("latents", "prompt_embeds", "prompt_mask"):
        before, after = (torch.cat([batch[name] for batch, _ in some]) for some in (parts, other))
        assert torch.equal(after.roll(-2, 0), before)
    assert torch.equal(torch.cat([draw.noise for _, draw in other]).roll(-2, 0), torch.cat([draw.noise for _, draw in parts]))
    assert not torch.equal(other[0][0]["latents"], parts[0][0]["latents"])


def test_differences() -> None:
    assert scaling.differences([1.0, 2.2], [1.0, 2.0]) == pytest.approx((0.1, 0.1 / 2**0.5))


if __name__ == "__main__":
    work(Path(sys.argv[1]), json.loads(sys.argv[2]))
