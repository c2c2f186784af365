"""Writes the captions of the training scenes, already tokenised, while the GPU is busy with something else.

    python -m train.tiny.caption_cache --sprites F --out FILE.npz --plan '{"256x256": [200000, 100, 1.0]}' --captions 3 --length 48

For each bucket of the plan (number of scenes, seed, aspect): several captions of each of the scenes that `training_scenes` gives.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from train.tiny.captions import Names, caption
from train.tiny.scenes import HeldOut, SceneArrays, draw_scenes
from train.tiny.sprites import load_sprites
from train.tiny.tokenizer import encode_captions

CHUNK = 4096  # scenes a task


def training_scenes(num: int, seed: int, aspect: float, class_names: list[str]) -> SceneArrays:
    """What the transformer is trained on: no held-out combination."""
    return draw_scenes(num, seed=seed, num_objects=len(class_names), aspect=aspect, without=HeldOut.of(class_names))


def tokenise(scenes: SceneArrays, names: list[Names], tokenizer_json: str, *, captions: int, length: int, seed: int) -> np.ndarray:
    """(n, captions, width) int16: token ids of `captions` captions a scene."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = np.random.Generator(np.random.Philox(seed))
    texts = [caption(scenes.scene(index), names, rng) for index in range(len(scenes)) for _ in range(captions)]
    ids, _ = encode_captions(tokenizer, texts, length)
    return ids.reshape(len(scenes), captions, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", type=json.loads, required=True)
    parser.add_argument("--captions", type=int, default=3)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    args = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes below are the parallelism
    sprites = load_sprites(args.sprites)
    arrays: dict[str, np.ndarray] = {}
    with ProcessPoolExecutor(args.workers) as pool:
        for bucket, (num, seed, aspect) in args.plan.items():
            scenes = training_scenes(num, seed, aspect, sprites.class_names)
            futures = [
                pool.submit(
                    tokenise, scenes.select(np.arange(start, min(start + CHUNK, num))), sprites.names, sprites.tokenizer_json,
                    captions=args.captions, length=args.length, seed=seed * 1_000_003 + start,
                )
                for start in range(0, num, CHUNK)
            ]  # fmt: skip
            arrays[bucket] = np.concatenate([future.result() for future in futures])
    temporary = args.out.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
