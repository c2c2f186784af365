"""Train a transformer on cached latents: `python -m train.run experiment=NAME [key=value …]`.

    sana data prepare DATA --model CHECKPOINT --out CACHE
    python -m train.run experiment=sana_600m_512px data.cache=CACHE/…

The configuration is composed and checked before anything is loaded. A run whose folder holds a checkpoint goes on from it, to the
same losses; one with another configuration is refused, unless --allow-changes is given. SIGTERM and Ctrl-C save and end with 0.
One process: several are not started from here yet.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

import torch

from engines.errors import SanaError
from sana_ref import checkpoint as checkpoints
from sana_ref.transformer import SanaTransformer2DModel
from train.data.encoders import expected_identity
from train.data.reading import Cache
from train.data.stream import CachedSource
from train.objective.flow import FlowObjective
from train.schema import ExperimentSettings, load, transformer_config
from train.trainer.errors import TrainingError
from train.trainer.loop import Trainer
from train.trainer.stop import Stop

__all__ = ["main", "make_trainer"]

TEXT_TOKENS = 300  # of published models; a checkpoint says its own
PREFIX = "experiment="


def make_trainer(settings: ExperimentSettings, *, log: Callable[[str], None] = print) -> Trainer:
    """The run that `settings` describes, at its beginning. Raises DataError, TrainingError and the errors of a checkpoint."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 or settings.parallel.strategy in ("ddp", "fsdp2"):
        raise TrainingError(
            f"parallel: got {world_size} processes and strategy {settings.parallel.strategy}; expected one process, which is all "
            "that this program starts so far. Set parallel.strategy=single, and run it without torchrun."
        )
    if settings.data.cache is None:
        raise TrainingError("data.cache: got null; expected the folder that `sana data prepare` named. Set data.cache=FOLDER")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, length, expected = transformer_config(settings.model), TEXT_TOKENS, {}
    torch.manual_seed(settings.trainer.seed)
    model = SanaTransformer2DModel(config)
    if settings.model.checkpoint is not None:
        start = checkpoints.load(settings.model.checkpoint)
        if start.transformer_config != config:
            raise TrainingError(
                f"model.checkpoint: got {settings.model.checkpoint}, a transformer with {start.transformer_config}; "
                f"expected {config}"
            )
        model.load_state_dict(start.transformer(torch.float32, "cpu").state_dict())
        length, expected = start.prompt.max_sequence_length, expected_identity(start)
    source = CachedSource(
        Cache(settings.data.cache, expected),
        micro_batch=settings.trainer.micro_batch,
        length=length,
        seed=settings.data.seed,
        temperature=settings.data.caption_temperature,
    )
    # Where things lie may change when a run goes on; what is computed, and for how long, may not.
    kept = settings.model_dump(mode="json", exclude={"env": True, "trainer": {"folder"}, "data": {"path", "cache"}})
    return Trainer(
        model.to(device).requires_grad_(True).train(),
        source,
        settings.trainer,
        FlowObjective(settings.objective),
        config=kept,
        log=log,
    )


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
        settings = load(names[0], [text for text in options.overrides if not text.startswith(PREFIX)], options.config_dir)
        trainer = make_trainer(settings)
        trainer.resume(allow_changes=options.allow_changes)
        done = trainer.run(stop)
    except (SanaError, OSError) as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"{settings.trainer.folder}: " + ("done" if done else "stopped and saved; the same command goes on"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
