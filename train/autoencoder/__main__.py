"""Finished autoencoders.

python -m train.autoencoder export RUN OUT
python -m train.autoencoder measure FOLDER --pictures DATA
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.errors import SanaError


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 with a message on stderr. `measure` prints JSON on stdout."""
    parser = argparse.ArgumentParser(
        prog="train.autoencoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="a run's newest checkpoint as a vae folder in diffusers' layout")
    exporting.add_argument("run", type=Path)
    exporting.add_argument("out", type=Path)
    exporting.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    measuring = commands.add_parser("measure", help="PSNR, SSIM and the latents' statistics of a vae folder")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--pictures", type=Path, required=True, help="sprites.safetensors, or a folder of pictures, or shards")
    measuring.add_argument("--side", type=int, default=512, help="px")
    for command in (exporting, measuring):
        command.add_argument("--num-pictures", type=int, default=256)
    options = parser.parse_args(argv)
    try:
        _export(options) if options.command == "export" else _measure(options)
    except (SanaError, OSError) as error:
        print(f"train.autoencoder: error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(options: argparse.Namespace) -> None:
    import torch

    from train.autoencoder.export import export

    export(options.run, options.out, num_pictures=options.num_pictures, dtype=getattr(torch, options.dtype))


def _measure(options: argparse.Namespace) -> None:
    import torch

    from train.autoencoder.measure import held_out, measure
    from train.autoencoder.settings import FileSettings, SceneSettings
    from train.autoencoder.weights import load_vae

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(options.folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    settings: FileSettings | SceneSettings
    if options.pictures.suffix == ".safetensors":
        size = (options.side, options.side)
        settings = SceneSettings(kind="scenes", path=options.pictures, sizes=(size,), weights=(1.0,))
    else:
        settings = FileSettings(kind="files", path=options.pictures, side=options.side)
    pictures = held_out(settings, options.num_pictures, micro_batch=8, device=device)
    print(json.dumps(measure(vae, pictures), indent=1))


if __name__ == "__main__":
    sys.exit(main())
