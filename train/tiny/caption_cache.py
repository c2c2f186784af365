"""The captions of the training scenes, tokenised once by all cores, in a file.

    python -m train.tiny.caption_cache sana_tiny_text scenes.sprites=F env.out=WORK

For each size: ids (n, K, S) int16 of K captions a scene, and facts (n, 4) int16: kind, first object, second (-1: none), colour.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from train.tiny.captions import ABOVE_BELOW, LEFT_RIGHT, Names, caption
from train.tiny.scenes import HeldOut, SceneArrays, draw_scenes
from train.tiny.settings import ScenesSettings
from train.tiny.sprites import load_sprites
from train.tiny.tokenizer import encode_captions

__all__ = ["captions_of", "training_scenes"]

CHUNK = 4096  # scenes a task


def training_scenes(settings: ScenesSettings, class_names: list[str]) -> dict[str, SceneArrays]:
    """What the transformer is trained on, by size ("512x512"): no held-out combination."""
    held_out = HeldOut.of(class_names)
    return {
        f"{width}x{height}": draw_scenes(
            num, seed=settings.seed + index, num_objects=len(class_names), aspect=width / height, without=held_out
        )
        for index, ((width, height), num) in enumerate(zip(settings.sizes, settings.nums, strict=True))
    }


def facts(scenes: SceneArrays) -> np.ndarray:
    """(n, 4) int16: kind, first object, second (-1: none), colour."""
    second = np.where(np.isin(scenes.kind, (LEFT_RIGHT, ABOVE_BELOW)), scenes.objects[:, 1], -1)
    return np.stack([scenes.kind, scenes.objects[:, 0], second, scenes.colour], axis=1).astype(np.int16)


def tokenise(scenes: SceneArrays, names: list[Names], tokenizer_json: str, *, captions: int, length: int, seed: int) -> np.ndarray:
    """(n, captions, width) int16: token ids of `captions` captions a scene."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = np.random.Generator(np.random.Philox(seed))
    texts = [caption(scenes.scene(index), names, rng) for index in range(len(scenes)) for _ in range(captions)]
    ids, _ = encode_captions(tokenizer, texts, length)
    return ids.reshape(len(scenes), captions, -1)


def captions_of(settings: ScenesSettings, folder: Path, *, log: Callable[[str], None] = print) -> Path:
    """The file of captions in `folder`, made if it is not there; its name has the digest of the settings."""
    digest = hashlib.sha256(settings.model_dump_json(exclude={"sprites"}).encode() + settings.sprites.read_bytes()).hexdigest()
    path = folder / f"captions-{digest[:16]}.npz"
    if path.is_file():
        return path
    sprites = load_sprites(settings.sprites)
    arrays: dict[str, np.ndarray] = {}
    # Started anew, not forked: a process that has begun threads or CUDA must not be copied.
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=get_context("spawn")) as pool:
        for number, (size, scenes) in enumerate(training_scenes(settings, sprites.class_names).items()):
            starts = range(0, len(scenes), CHUNK)
            futures = [
                pool.submit(
                    tokenise, scenes.select(np.arange(start, min(start + CHUNK, len(scenes)))), sprites.names,
                    sprites.tokenizer_json, captions=settings.captions, length=settings.length,
                    seed=(settings.seed + number) * 1_000_003 + start,
                )
                for start in starts
            ]  # fmt: skip
            arrays[f"{size} ids"] = np.concatenate([future.result() for future in futures])
            arrays[f"{size} facts"] = facts(scenes)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{path.stem}.{os.getpid()}.tmp.npz"
    np.savez(temporary, **arrays)  # type: ignore[arg-type]  # its other keyword is a truth value, and no array has its name
    os.replace(temporary, path)
    log(f"captions: {sum(len(ids) for name, ids in arrays.items() if name.endswith('ids'))} scenes in {path}")
    return path


def main() -> None:
    from train import tasks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-dir", metavar="FOLDER")
    args = parser.parse_args()
    settings, _ = tasks.load(args.experiment, args.overrides, args.config_dir)
    captions_of(settings.scenes, settings.trainer.folder.parent)


if __name__ == "__main__":
    main()
