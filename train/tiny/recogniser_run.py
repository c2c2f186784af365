"""Training of the judge: half of its pictures are composed close-ups, half went through an autoencoder.

It sees no picture of the model that it is to judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_ref.autoencoder import AutoencoderDC
from train.autoencoder.weights import load_vae
from train.objective.place import Place
from train.parallel.processes import Processes
from train.tiny.captions import ABOVE_BELOW, COLOUR_NAMES, LEFT_RIGHT, SINGLE, THREE
from train.tiny.evaluate import PLACES, cut
from train.tiny.recogniser import INPUT_SIDE, RECOGNISER, Recogniser, augment, close_ups
from train.tiny.scenes import SceneTensors, compose, draw_scenes, palette
from train.tiny.settings import SceneRecogniserExperiment
from train.tiny.sprites import load_sprites
from train.tiny.table import TableSource
from train.trainer.errors import TrainingError
from train.trainer.loop import Trainer

__all__ = ["SETTINGS", "load_autoencoder", "make_trainer"]

SETTINGS = SceneRecogniserExperiment
CLOSE_UPS = 100_000
SHARES = ((SINGLE, 1.0), (LEFT_RIGHT, 0.15), (ABOVE_BELOW, 0.15), (THREE, 0.1))  # of `decoded`, by kind


def load_autoencoder(folder: Path, device: torch.device) -> AutoencoderDC:
    """From a folder in diffusers' layout; bf16 and channels last on a GPU, fp32 on a CPU."""
    model = load_vae(folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    return model.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload,no-any-return]


@torch.no_grad()
def decoded_objects(
    model: AutoencoderDC, sprites: Tensor, *, num: int, num_classes: int, side: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Objects as the autoencoder shows them: (m, 3, 96, 96) uint8 and (m, 2) emoji and colour.

    Whole pictures of one object, and parts of pictures of several. side: px of the pictures.
    """
    device, dtype = sprites.device, next(model.parameters()).dtype
    pictures, labels = [], []
    for kind, share in SHARES:
        scenes = draw_scenes(max(4, int(num * share)), seed=seed + kind, num_objects=num_classes, kind=kind)
        for start in range(0, len(scenes), 64):
            part = SceneTensors.of(scenes, device)[start : start + 64]
            composed = compose(part, sprites, width=side, height=side, colours=palette(device))
            decoded = model.decode(model.encode(composed.to(dtype, memory_format=torch.channels_last))).float().clamp(-1, 1)
            places = [None] if kind == SINGLE else list(PLACES[kind])
            for index, place in enumerate(places):
                seen = decoded if place is None else cut(decoded, place)
                small = F.interpolate(seen, size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", antialias=True, align_corners=False)
                pictures.append(((small + 1) * 127.5).round().clamp(0, 255).byte())
                labels.append(torch.stack([part.objects[:, index], part.colour], dim=1))
    return torch.cat(pictures), torch.cat(labels)


def _objective(model: Callable[[Tensor], tuple[Tensor, Tensor]], batch: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """The trainer seeds PyTorch's generators by the place, so that `augment` is a function of it."""
    guess, guess_colour = model(augment(batch["pictures"]))
    loss = F.cross_entropy(guess, batch["emoji"], label_smoothing=0.05) + 0.3 * F.cross_entropy(guess_colour, batch["colour"])
    return {"loss": loss, "right": (guess.argmax(1) == batch["emoji"]).float().mean()}


def make_trainer(settings: SceneRecogniserExperiment, *, processes: Processes, log: Callable[[str], None] = print) -> Trainer:
    """The run that `settings` describes, at its beginning. Raises TrainingError, FileNotFoundError."""
    if processes.world_size > 1:
        raise TrainingError(f"parallel: got {processes.world_size} processes; expected one, which takes less than a minute.")
    device = processes.device
    sprites = load_sprites(settings.sprites, device)
    found = [
        decoded_objects(
            load_autoencoder(folder, device), sprites.rgba, num=settings.decoded, num_classes=sprites.num_classes,
            side=settings.side, seed=settings.seed,
        )
        for folder in settings.autoencoders
    ]  # fmt: skip
    decoded, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    near = SceneTensors.of(close_ups(CLOSE_UPS, seed=settings.seed + 50, num_classes=sprites.num_classes), device)
    colours = palette(device)
    half = settings.trainer.micro_batch // 2

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        chosen = near[torch.randint(CLOSE_UPS, (half,), generator=generator).to(device)]
        others = torch.randint(len(decoded), (settings.trainer.micro_batch - half,), generator=generator).to(device)
        fresh = compose(chosen, sprites.rgba, width=INPUT_SIDE, height=INPUT_SIDE, colours=colours)
        return {
            "pictures": torch.cat([fresh, decoded[others].float() / 127.5 - 1]),
            "emoji": torch.cat([chosen.objects[:, 0], labels[others, 0]]),
            "colour": torch.cat([chosen.colour, labels[others, 1]]),
        }

    torch.manual_seed(settings.trainer.seed)
    model = Recogniser(sprites.num_classes, len(COLOUR_NAMES), **RECOGNISER).to(device).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = TableSource(make, seed=settings.trainer.seed, what=hashlib.sha256(settings.sprites.read_bytes()).hexdigest())
    kept = settings.model_dump(mode="json", exclude={"env": True, "trainer": {"folder"}, "sprites": True, "autoencoders": True})
    return Trainer(model, source, settings.trainer, _objective, config=kept, log=log)
