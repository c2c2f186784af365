"""What each process of the tests does: runs of a small transformer, one after the other, as `train.run` would make them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from train import tasks
from train.parallel.processes import Processes, process_group
from train.trainer.errors import TrainingError
from train.trainer.loop import Trainer
from train.trainer.stop import Stop


def train(options: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """options: overrides; stop, a step; poison, of a process, a step whose loss is not finite; break_save, of a process; validated.

    Returns the losses by step, and what else came of it.
    """
    lines: list[str] = []
    losses: dict[int, float] = {}
    seen: dict[str, Any] = {"losses": losses, "log": lines}
    stop = Stop()
    settings, make_trainer = tasks.load("small", options["overrides"], options["configs"])
    trainer: Trainer = make_trainer(settings, processes=processes, log=lines.append)
    mine = processes.rank == options.get("process", 0)

    def on_step(step: int, loss: float) -> None:
        losses[step] = loss
        stop.requested = mine and step == options.get("stop")

    trainer.on_step, objective = on_step, trainer.objective
    if "poison" in options:
        trainer.objective = lambda model, batch, place: {
            "loss": objective(model, batch, place)["loss"] * (torch.nan if mine and place.step + 1 == options["poison"] else 1)
        }
    if options.get("validated"):

        def validate(step: int, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
            assert processes.rank == 0
            return {"norm": sum(float(t.double().square().sum()) for t in weights.values()), "tensors": len(weights)}

        trainer.validate, trainer.validation_steps = validate, 2
    try:
        trainer.resume(allow_changes=options.get("allow_changes", False))
        with torch.random.fork_rng():
            seen["done"] = trainer.run(stop) if "break_save" not in options else _run_with_a_full_disk(trainer, stop, mine)
    except TrainingError as error:
        seen["error"] = str(error)
    seen["sharded"] = sum(isinstance(p, DTensor) for p in trainer.parameters.values())
    seen["counts"] = [trainer.step, trainer.updates, trainer.non_finite]
    return seen


def _run_with_a_full_disk(trainer: Trainer, stop: Stop, mine: bool) -> bool:
    """From the second save on, one process cannot write its share."""
    from torch.distributed.checkpoint import filesystem

    write, num = filesystem.FileSystemWriter.write_data, [0]

    def full(self: Any, *arguments: Any) -> Any:
        num[0] += 1
        if mine and num[0] > 1:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    filesystem.FileSystemWriter.write_data = full  # type: ignore[method-assign]
    try:
        return trainer.run(stop)
    finally:
        filesystem.FileSystemWriter.write_data = write  # type: ignore[method-assign]


def main() -> None:
    phases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    with process_group() as processes:
        for name, options in phases.items():
            found = train(options, processes)
            everybodys: list[Any] = [None] * processes.world_size
            dist.all_gather_object(everybodys, found)
            if processes.rank == 0:
                (out / f"{name}.json").write_text(json.dumps(everybodys))


if __name__ == "__main__":
    main()
