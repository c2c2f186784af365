"""Trains sana-tiny from sprites to a measured model.

    python -m train.tiny --sprites out/sprites/sprites.safetensors --work DIR --out DIR --until-seconds 570

Stages, each skipped when its result is in the work folder: ae (autoencoder), latents (scenes encoded once), text (the text encoder
alone, on what captions say), dit (transformer and text encoder), recogniser, eval. An invocation stops by itself after
--until-seconds with everything saved; the next one goes on. Give --finish with the last one: the transformer's training then
takes all the time that is left before recogniser and evaluation, and its learning rate comes down. What is done so far is
written to --out; `python -m train.tiny.export_tiny` lays it out as a model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from train.tiny.fast import check_kernels
from train.tiny.handover import deliver
from train.tiny.loop import Log
from train.tiny.models import MINUSCULE, TINY
from train.tiny.stages import STAGES
from train.tiny.tiny_run import Run
from train.trainer.stop import Stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything. The defaults are for a GPU with 80 GB."""

    scenes: int = 120_000  # scenes encoded at 256 px; the other sizes get an eighth each
    captions: int = 3  # a scene
    length: int = 48  # text positions in training; longer captions are refused
    ae_scenes: int = 100_000  # rows of the autoencoder's scene table, per size
    ae_batch: int = 64
    batch: int = 512
    decoded: int = 12_000  # single objects that the recogniser sees decoded
    single_questions: int = 1000
    other_questions: int = 300


SMOKE = Sizes(scenes=512, captions=2, ae_scenes=256, ae_batch=4, batch=16, decoded=64, single_questions=24, other_questions=8)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--until-seconds", type=float, default=570.0, help="stop this long after the start, everything saved")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--finish", action="store_true", help="the last invocation: bring the learning rate down in the time left")
    parser.add_argument("--ae-seconds", type=float, default=170.0)
    parser.add_argument("--text-seconds", type=float, default=20.0)
    parser.add_argument("--dit-seconds", type=float, default=520.0)
    parser.add_argument("--recogniser-seconds", type=float, default=40.0)
    parser.add_argument("--eval-seconds", type=float, default=40.0, help="reserved for evaluation and writing")
    parser.add_argument("--no-graphs", action="store_true", help="run steps kernel by kernel, without CUDA graphs")
    parser.add_argument("--steps", type=int, help="steps of each training stage instead of seconds (exactly repeatable)")
    parser.add_argument("--smoke", action="store_true", help="minuscule models and data: to try the program on a CPU")
    args = parser.parse_args(argv)
    for stage in args.stages.split(","):
        if stage not in STAGES:
            parser.error(f"--stages: got {stage!r}; expected a list of {', '.join(STAGES)}")
    return args


def main(argv: list[str] | None = None, *, stop: Stop | None = None) -> int:
    args = parse(argv)
    log = Log()
    if stop is None:
        stop = Stop()
        stop.install()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        log(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        check_kernels(device, log)
    run = Run(
        args=args,
        sizes=SMOKE if args.smoke else Sizes(),
        configs=MINUSCULE if args.smoke else TINY,
        device=device,
        log=log,
        stop=stop,
        end=log.start + args.until_seconds,
    )
    wanted = args.stages.split(",")
    if "latents" in wanted:
        run.start_captions()
    try:
        for stage in wanted:
            if stop.requested or time.monotonic() >= run.end:
                log(f"stopping before {stage}")
                break
            STAGES[stage](run)
    finally:
        run.stop_captions()
        deliver(run)
    log("done" if not stop.requested else "stopped as asked; run again with the same --work to go on")
    print(json.dumps({name: value for name, value in run.metrics.items() if name in ("vae", "eval", "recogniser")})[:3000])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
