"""Train what an experiment describes: `python -m train.run experiment=NAME [key=value …]`; on several GPUs, with torchrun.

    sana data prepare DATA --model CHECKPOINT --out CACHE
    python -m train.run experiment=sana_600m_512px data.cache=CACHE/…
    torchrun --nproc-per-node 8 -m train.run experiment=sana_600m_512px data.cache=CACHE/…

The configuration is composed and checked before anything is loaded. A run whose folder holds a checkpoint goes on from it, to the
same losses, also on another number of GPUs; one with another configuration is refused, unless --allow-changes is given. SIGTERM, to
one process or all, and Ctrl-C save and end with 0.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from engines.errors import SanaError
from train import tasks
from train.parallel.processes import Processes, process_group
from train.trainer.stop import Stop

if TYPE_CHECKING:
    from train.trainer.loop import Trainer

__all__ = ["main"]

PREFIX = "experiment="


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all steps are done, or after SIGTERM or Ctrl-C, which save; 2 with a message on stderr if it cannot be done."""
    parser = argparse.ArgumentParser(prog="train.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="experiment=NAME key=value")
    parser.add_argument("--config-dir", metavar="FOLDER", help="more configuration, searched first")
    parser.add_argument("--allow-changes", action="store_true", help="go on although the configuration differs, and say in what")
    options = parser.parse_intermixed_args(arguments)
    names = [text.removeprefix(PREFIX) for text in options.overrides if text.startswith(PREFIX)]
    if len(names) != 1:
        parser.error(f"got {len(names)} experiments; expected one: experiment=NAME. `sana config show NAME` shows it")
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    try:
        overrides = [text for text in options.overrides if not text.startswith(PREFIX)]
        settings, make_trainer = tasks.load(names[0], overrides, options.config_dir)
        with process_group() as processes:
            if processes.device.type == "cuda" and settings.trainer.precision == "bf16":
                torch.set_float32_matmul_precision("high")  # the few products that are fp32 are more exact in TF32 than all others
            done = _train(make_trainer, settings, processes, stop, allow_changes=options.allow_changes)
    except (SanaError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))  # the others say it in short: most errors are everybody's
        print(f"train: error: {error}" if not rank else f"train, process {rank}: {error!s:.80}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if processes.rank == 0:
        print(f"{settings.trainer.folder}: " + ("done" if done else "stopped and saved; the same command goes on"))
    return 0


def _train(make_trainer: Callable[..., Trainer], settings: Any, processes: Processes, stop: Stop, *, allow_changes: bool) -> bool:
    """Whether all steps are done. A function of its own, so that the trainer is gone before its process group is."""
    trainer = make_trainer(settings, processes=processes, log=functools.partial(print, flush=True))
    trainer.resume(allow_changes=allow_changes)
    return trainer.run(stop)


if __name__ == "__main__":
    sys.exit(main())
