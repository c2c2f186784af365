"""How well sana-tiny's autoencoders give pictures back: scenes kept out of their training, encoded and decoded.

    python benchmarks/reconstruction.py models/sana-tiny --sprites out/sprites.safetensors --record

Full (vae/) and Lite (vae_lite/) see the same scenes. PSNR in dB is the mean over pictures clamped to their range. The sprites are
made by `python -m train.tiny.prepare_sprites`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.figures import record
from engines.errors import SanaError
from train.autoencoder.measure import measure
from train.autoencoder.weights import load_vae
from train.tiny.scenes import held_out_pictures
from train.tiny.sprites import load_sprites

FIGURES = {"vae": "tiny_dcae_full_psnr_db", "vae_lite": "tiny_dcae_lite_psnr_db"}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 with a message on stderr if it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--side", type=int, default=512, help="px; default 512")
    parser.add_argument("--pictures", type=int, default=64, help="default 64")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        sprites = load_sprites(options.sprites, device)
        side = (options.side, options.side)
        pictures = held_out_pictures(sprites.rgba, options.pictures, sprites.num_classes, side, batch=8)
        for name, figure in FIGURES.items():
            found = measure(load_vae(options.model / name).to(device, torch.float32).eval(), pictures)
            print(f"{name}: PSNR {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.4f}, {found['num_pictures']} scenes")
            if options.record:
                note = f"{found['num_pictures']} scenes kept out, {options.side} px, SSIM {found['ssim']:.3f}, fp32, stored weights"
                record(figure, found["psnr_db"], "dB", note=note)
    except (SanaError, OSError) as error:
        print(f"reconstruction: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
