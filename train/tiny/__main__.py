"""Trains sana-tiny, from sprites to a measured model: five experiments of the training system, one after the other.

    python -m train.tiny --sprites out/sprites.safetensors --work out/sana-tiny-training

What is finished is not done again. SIGTERM and Ctrl-C save and end with 0, and the same command goes on. The model is in
WORK/sana-tiny; `python -m train.tiny.prepare_sprites --out FILE` makes the sprites.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import SanaError
from sana_ref import checkpoint as checkpoints
from train import run as train_run
from train import tasks
from train.autoencoder.export import export
from train.autoencoder.measure import measure
from train.data.prepare import Progress
from train.grid import grid
from train.tiny import recogniser
from train.tiny.captions import COLOUR_NAMES, SINGLE
from train.tiny.card import JUDGED
from train.tiny.evaluate import evaluate, grid_captions, unit
from train.tiny.layout import write_card, write_finished, write_start
from train.tiny.recogniser_run import load_autoencoder
from train.tiny.sampling import Painter
from train.tiny.scene_cache import SceneShards
from train.tiny.scenes import SceneTensors, compose, draw_scenes, held_out_pictures, palette
from train.tiny.sprites import load_sprites
from train.tiny.text import trained_encoder
from train.trainer.checkpoint import latest
from train.trainer.errors import TrainingError

SAMPLES = 32  # pictures of samples.png
NUM_PICTURES = 256  # that an autoencoder is measured on
NUM_SINGLE = 1000  # scenes that the recogniser itself is judged on
HELD_OUT_SEED = 951  # of the scenes on which the judge is judged


class Stopped(Exception):
    """A run was asked to stop, and has saved."""


class Training:
    """What the stages share: where things are, and what was measured (WORK/metrics.json)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.config_dir: Path | None = args.config_dir
        self.questions: int = args.questions
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sprites = load_sprites(args.sprites, self.device)
        self.common = [f"env.out={self.work}", *args.overrides]
        sprites = args.sprites.resolve()
        self.overrides: dict[str, list[str]] = {
            "sana_tiny_dcae": [f"pictures.path={sprites}"],
            "sana_tiny_dcae_lite": [f"pictures.path={sprites}", f"autoencoder.encoder_from={self.work / 'vae'}"],
            "sana_tiny_text": [f"scenes.sprites={sprites}"],
            "sana_tiny_recogniser": [f"sprites={sprites}", f"autoencoders=[{self.work / 'vae'},{self.work / 'vae_lite'}]"],
            "sana_tiny": [f"model.checkpoint={self.work / 'start'}"],
        }
        path = self.work / "metrics.json"
        self.metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seconds": {}}

    @property
    def where(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "a CPU"

    def record(self, name: str, value: Any) -> None:
        self.metrics[name] = value
        temporary = self.work / "metrics.tmp"
        temporary.write_text(json.dumps(self.metrics, indent=1))
        os.replace(temporary, self.work / "metrics.json")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds of a stage, over all invocations; also of one that is stopped."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.metrics["seconds"]
            self.record("seconds", seconds | {name: round(seconds.get(name, 0.0) + time.monotonic() - began, 1)})

    def settings(self, experiment: str) -> Any:
        return tasks.load(experiment, [*self.overrides[experiment], *self.common], self.config_dir)[0]

    def trained(self, experiment: str, *more: str) -> Path:
        """Run an experiment to its end, if it is not there yet. Returns its folder. Raises Stopped, TrainingError."""
        self.overrides[experiment] += more
        trainer = self.settings(experiment).trainer
        if not _finished(trainer):
            print(f"\n{experiment}", flush=True)
            self.record("device", self.where)
            arguments = [f"experiment={experiment}", *self.overrides[experiment], *self.common]
            with self.timed(experiment):
                code = train_run.main(arguments + (["--config-dir", str(self.config_dir)] if self.config_dir else []))
            if code:
                raise TrainingError(f"{experiment}: ended with exit code {code}; what it said is above.")
            if not _finished(trainer):
                raise Stopped(experiment)
        return Path(trainer.folder)


def _finished(trainer: Any) -> bool:
    there = latest(trainer.folder)
    return there is not None and there.name == f"step_{trainer.steps:08}"


def average(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a finished run."""
    path = latest(folder)
    assert path is not None
    return load_file(path / "ema.safetensors")


def autoencoders(training: Training) -> None:
    """Full, then Lite on the latents of Full's encoder; each exported and measured on scenes kept out."""
    for experiment, name in (("sana_tiny_dcae", "vae"), ("sana_tiny_dcae_lite", "vae_lite")):
        out = training.work / name
        if not out.is_dir():
            training.trained(experiment)
            settings = training.settings(experiment)
            export(settings, out, num_pictures=NUM_PICTURES, device=training.device)
        key = experiment.removeprefix("sana_tiny_")
        if key not in training.metrics:
            size = training.settings("sana_tiny_text").scenes.sizes[0]
            pictures = held_out_pictures(training.sprites.rgba, NUM_PICTURES, training.sprites.num_classes, size)
            training.record(key, measure(load_autoencoder(out, training.device), pictures))


def judge(training: Training) -> dict[str, Tensor]:
    """The recogniser's weights; its own accuracy on real scenes goes into the metrics."""
    weights = average(training.trained("sana_tiny_recogniser"))
    if "recogniser" not in training.metrics:
        model, device, sprites = make_judge(training, weights), training.device, training.sprites
        side = training.settings("sana_tiny_recogniser").side
        single = draw_scenes(NUM_SINGLE, seed=HELD_OUT_SEED, num_objects=sprites.num_classes, kind=SINGLE)
        tensors = SceneTensors.of(single, device)
        autoencoder = load_autoencoder(training.work / "vae", device)
        found: dict[str, list[Tensor]] = {"composed": [], "decoded": []}
        dtype = next(autoencoder.parameters()).dtype
        with torch.no_grad():
            for start in range(0, len(single), 50):
                picture = compose(tensors[start : start + 50], sprites.rgba, width=side, height=side, colours=palette(device))
                decoded = autoencoder.decode(autoencoder.encode(picture.to(dtype))).float().clamp(-1, 1)
                for name, seen in (("composed", picture), ("decoded", decoded)):
                    guess, colour = model(seen)
                    part = tensors[start : start + 50]
                    right = torch.stack([guess.argmax(1) == part.objects[:, 0], colour.argmax(1) == part.colour])
                    found[name].append(right.float())
        share = {name: torch.cat(parts, dim=1).mean(1).tolist() for name, parts in found.items()}
        training.record("recogniser", {name: {"emoji": emoji, "colour": colour} for name, (emoji, colour) in share.items()})
    return weights


def make_judge(training: Training, weights: dict[str, Tensor]) -> recogniser.Recogniser:
    model = recogniser.Recogniser(training.sprites.num_classes, len(COLOUR_NAMES), **recogniser.RECOGNISER)
    model.load_state_dict(weights)
    return model.float().to(training.device).eval().requires_grad_(False)


def cache(training: Training) -> Path:
    """The start of the transformer's training: a model folder without training, and its scenes encoded. Returns the cache."""
    start = training.work / "start"
    settings = training.settings("sana_tiny_text")
    if not start.is_dir():
        encoder = trained_encoder(training.trained("sana_tiny_text"))
        model = training.settings("sana_tiny").model.model_copy(update={"checkpoint": None})
        write_start(
            start, vae=training.work / "vae", text_encoder=encoder, size=settings.size, model=model, sprites=training.sprites,
            seed=settings.trainer.seed,
        )  # fmt: skip
    shards = SceneShards(
        checkpoints.load(start), settings.scenes, training.work / "cache", training.device, folder=settings.trainer.folder.parent
    )
    if not (shards.folder / "index.json").is_file():
        with training.timed("scenes encoded"):
            shards.write(on_shard=Progress("shards of scenes"))
    return shards.folder


def finish(training: Training, transformer: dict[str, Tensor], recogniser_weights: dict[str, Tensor]) -> Path:
    """Lay out the model, let the judge look at what it draws, write its card."""
    model, text = training.settings("sana_tiny"), training.settings("sana_tiny_text")
    target, names = training.work / "sana-tiny", training.sprites.names[: training.sprites.num_classes]
    write_finished(
        target, start=training.work / "start", transformer=transformer, vae_lite=training.work / "vae_lite",
        recogniser=recogniser_weights, sprites=training.sprites,
    )  # fmt: skip
    with training.timed(JUDGED):
        painter = Painter.of(target, training.device)
        report = evaluate(
            painter,
            make_judge(training, recogniser_weights),
            names,
            num_single=2 * training.questions,
            num_other=training.questions,
        )
        training.record("eval", report)
        texts = grid_captions(names, SAMPLES)
        grid(unit(painter.draw(texts, seed=11)), texts, target / "samples.png")
    training.record("sizes", [list(size) for size in text.scenes.sizes])
    training.record("num_classes", training.sprites.num_classes)
    training.record("num_layers", model.model.transformer.num_layers)
    training.record("text_layers", checkpoints.load(target).text_encoder_config.num_hidden_layers)
    training.record("pictures_seen", model.trainer.steps * model.trainer.batch)
    training.record("judged_on", training.where)
    write_card(target, training.metrics)
    return target


def captions_beside(training: Training) -> subprocess.Popen[bytes]:
    """Lets another process write the captions while the GPU is busy."""
    command = [sys.executable, "-m", "train.tiny.caption_cache", "sana_tiny_text", *training.overrides["sana_tiny_text"]]
    command += training.common + (["--config-dir", str(training.config_dir)] if training.config_dir else [])
    return subprocess.Popen(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the model is there, or after SIGTERM or Ctrl-C in a training; 2 with a message if it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every experiment, such as trainer.tensorboard=false")
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--config-dir", type=Path, help="more configuration, searched first")
    parser.add_argument(
        "--questions", type=int, default=250, help="captions of each kind that are judged, twice as many of one object"
    )
    options = parser.parse_intermixed_args(arguments)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    try:
        training = Training(options)
        with captions_beside(training) as writer:
            try:
                autoencoders(training)
                weights = judge(training)
                writer.wait()
                folder = cache(training)
            finally:
                writer.terminate()
        transformer = average(training.trained("sana_tiny", f"data.cache={folder}"))
        target = finish(training, transformer, weights)
    except Stopped as stopped:
        print(f"{stopped}: stopped and saved; the same command goes on")
        return 0
    except (SanaError, OSError) as error:
        print(f"train.tiny: error: {error}", file=sys.stderr)
        return 2
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total / 1e6:.1f} MB in all, {sum(training.metrics['seconds'].values()) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
