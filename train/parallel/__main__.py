"""`python -m train.parallel convert`: a distributed checkpoint becomes one file in diffusers' layout, and back.

    python -m train.parallel convert runs/a/step_1000 out/transformer
    python -m train.parallel convert out/transformer runs/b/start

SOURCE is a checkpoint's folder, whose transformer config is given with --config, or a diffusers folder (config.json and
diffusion_pytorch_model.safetensors). Weights only: the way back starts a new run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.parallel.checkpoint import to_dcp, to_safetensors

FILE = "diffusion_pytorch_model.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def convert(source: Path, out: Path, config: Path | None, dtype: str) -> str:
    """Returns what was written, for people. Raises ValueError and FileNotFoundError, said for people too."""
    if out.exists():
        raise ValueError(f"{out}: got a name that is taken; expected a new one. Nothing is overwritten.")
    sharded = (source / ".metadata").is_file()
    config = config or source / "config.json"
    if not sharded and not (source / FILE).is_file():
        raise FileNotFoundError(f"{source}: got neither a distributed checkpoint (.metadata) nor {FILE}; expected one of them")
    if not config.is_file():
        raise FileNotFoundError(f"{config}: got no transformer config; expected diffusers' config.json. Name it with --config")
    model = SanaTransformer2DModel(SanaTransformerConfig.from_json(json.loads(config.read_text(encoding="utf-8"))))
    if not sharded:
        to_dcp(source / FILE, model, out)
        return f"{out}: distributed checkpoint, weights only"
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    to_safetensors(source, model, part / FILE, dtype=DTYPES[dtype])
    shutil.copyfile(config, part / "config.json")
    os.replace(part, out)
    return f"{out}: {FILE} in {dtype}, {(out / FILE).stat().st_size / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 with a message on stderr if it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="train.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser("convert")
    command.add_argument("source", type=Path)
    command.add_argument("out", type=Path, help="a folder that does not exist yet")
    command.add_argument("--config", type=Path, help="the transformer's config.json; default: the one in SOURCE")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the one file; default fp32")
    options = parser.parse_args(arguments)
    try:
        print(convert(options.source, options.out, options.config, options.dtype))
    except (ValueError, OSError) as error:
        print(f"checkpoint: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
