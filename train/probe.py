"""Times the ways of `train.fast` to run a training step, in a process of its own, beside the autoencoder's training.

`python -m train.probe --out FILE.json --batch 512`: for each option milliseconds a step (as a CUDA graph, the GPU being shared
with the autoencoder's training, so only the order means something) and how far its gradient lies from that of the plainest
option. Compiled code stays in the compiler's cache on disk, where the training finds it: compiling costs no training time. The
file is rewritten after each option, so whoever reads it early sees what is known so far.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.dit import LatentCache, make_step
from train.fast import OPTIONS, prepare
from train.flat import AdamWConfig, FlatParameters
from train.loop import Log, capture, configure_gpu
from train.models import BUCKETS, MINUSCULE, PX_PER_LATENT, TINY, compute_dtype, make_text_encoder, make_transformer

TOLERANCE = 0.05  # of the gradient, relative; two bf16 computations of the same differ by about 0.01
ORDER = ("truth", "eager", "shifted", "compiled")  # the plainest first: the others are compared with it


def made_up_cache(bucket: str, device: torch.device, *, width: int, vocabulary: int, num: int = 4096) -> LatentCache:
    """Random latents and tokens in the shapes of the real ones."""
    columns, rows = (side // PX_PER_LATENT for side in BUCKETS[bucket])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((num, 32, rows, columns), generator=generator).to(device, torch.float16)
    ids = torch.randint(4, vocabulary, (num, 1, width), generator=generator).short().to(device)
    return LatentCache(latents=latents, ids=ids, facts=torch.zeros(num, 4, dtype=torch.long, device=device))


def try_option(
    option: str, configs: dict[str, dict[str, Any]], buckets: list[str], batch: int, prefix: int, length: int, log: Log
) -> Iterator[tuple[str, Tensor, float]]:
    """Yields (bucket, gradient on fixed inputs, milliseconds a step) for each bucket in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    transformer, encoder = make_transformer(configs["transformer"]), make_text_encoder(configs["text_encoder"])
    with torch.no_grad():
        for parameter in transformer.parameters():  # what begins at zero would hide the gradients behind it
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    models = {"transformer": transformer, "text_encoder": encoder}
    flat = FlatParameters(models, AdamWConfig(), device=device, dtype=compute_dtype(device))
    prepare(transformer, encoder, option)
    stats = torch.zeros(3, device=device)
    for bucket in buckets:
        cache = made_up_cache(bucket, device, width=prefix + length - 2, vocabulary=configs["text_encoder"]["vocab_size"])
        step = make_step(transformer, encoder, flat, cache, prefix=prefix, batch=batch, stats=stats)
        torch.manual_seed(1)
        step()
        gradient = flat.gradient.clone()
        graph = capture(step, log, f"{option} {bucket}")
        times = []
        for _ in range(3):
            began = time.monotonic()
            for _ in range(10 if device.type == "cuda" else 1):
                graph()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.monotonic() - began) * (100 if device.type == "cuda" else 1000))
        yield bucket, gradient, min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--prefix", type=int, default=13)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--options", default=",".join(ORDER))
    parser.add_argument("--minuscule", action="store_true")
    args = parser.parse_args()
    log, configs = Log(), MINUSCULE if args.minuscule else TINY
    if torch.cuda.is_available():
        configure_gpu()
    found: dict[str, dict[str, Any]] = {}

    def write() -> None:
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(found))
        os.replace(temporary, args.out)

    reference = None
    buckets = list(BUCKETS)
    for option in args.options.split(","):
        if option not in OPTIONS:
            raise SystemExit(f"--options: got {option!r}; expected a list of {OPTIONS}")
        began = time.monotonic()
        try:
            _, gradient, milliseconds = next(try_option(option, configs, buckets[:1], args.batch, args.prefix, args.length, log))
        except Exception as error:  # an option that does not work here is not chosen; the others still may
            found[option] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            log(f"{option}: {found[option]['error']}")
            write()
            continue
        reference = gradient if reference is None else reference
        difference = ((gradient - reference).norm() / reference.norm()).item()
        found[option] = {"ms": milliseconds, "gradient_difference": difference, "seconds": time.monotonic() - began}
        log(f"{option}: {milliseconds:.2f} ms a step, gradient differs by {difference:.4f}")
        write()
    best = choose(found)
    if best in ("compiled", "shifted"):  # fill the compiler's cache for the other sizes
        for bucket, _, milliseconds in try_option(best, configs, buckets[1:], args.batch, args.prefix, args.length, log):
            found[best][bucket] = milliseconds
            log(f"{best} {bucket}: {milliseconds:.2f} ms a step")
            write()
    found["finished"] = {"best": best}
    write()


def choose(found: dict[str, dict[str, Any]]) -> str:
    """The fastest option whose gradient is right; "eager" if nothing is known."""
    right = {option: row["ms"] for option, row in found.items() if row.get("gradient_difference", 1.0) < TOLERANCE}
    return min(right, key=right.__getitem__) if right else "eager"


if __name__ == "__main__":
    main()
