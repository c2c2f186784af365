"""`python -m train.parallel convert`: a training checkpoint becomes one file in diffusers' layout, and back.

    python -m train.parallel convert runs/a/step_00001000 out/transformer
    python -m train.parallel convert out/transformer runs/b/start

SOURCE is a checkpoint of a transformer's run, by one process or many, or any distributed checkpoint with --config; or a diffusers
folder (config.json and diffusion_pytorch_model.safetensors), which becomes a distributed checkpoint. Weights only: the average, if
the run has one, unless --weights model is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.errors import SanaError
from sana_ref.build import empty
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.parallel import checkpoint
from train.schema import ModelSettings, transformer_config

FILE = "diffusion_pytorch_model.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _config(source: Path, given: Path | None) -> SanaTransformerConfig:
    """From --config, config.json beside the weights, or what a run's checkpoint says of its model."""
    path = given or source / "config.json"
    if path.is_file():
        return SanaTransformerConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    if given is None and (source / "state.json").is_file():
        model = json.loads((source / "state.json").read_text(encoding="utf-8"))["config"].get("model")
        if isinstance(model, dict) and model.keys() & {"variant", "transformer"}:
            return transformer_config(ModelSettings.model_validate(model))
    raise FileNotFoundError(f"{path}: got no transformer config; expected diffusers' config.json. Name it with --config")


def _weights(source: Path, which: str | None) -> tuple[dict[str, Tensor], str]:
    """Of a checkpoint, by the model's own names, and which they are. What has no average is the model's."""
    model: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    if checkpoint.is_sharded(source):
        shapes = {name: shape for name, shape in checkpoint.shapes(source).items() if name.startswith(("model.", "ema."))}
        flat = {name: torch.empty(shape) for name, shape in shapes.items() if which != "model" or name.startswith("model.")}
        checkpoint.load(source, flat)
        model = {name.removeprefix("model."): tensor for name, tensor in flat.items() if name.startswith("model.")}
        average = {name.removeprefix("ema."): tensor for name, tensor in flat.items() if name.startswith("ema.")}
    else:
        model = load_file(source / "model.safetensors")
        if which != "model" and (source / "ema.safetensors").is_file():
            average = load_file(source / "ema.safetensors")
    if which == "ema" and not average:
        raise ValueError(f"{source}: got no average; expected one for --weights ema. Use --weights model")
    return model | average, "average" if average else "weights"


def _check(source: Path, weights: Mapping[str, Tensor], config: SanaTransformerConfig) -> None:
    expected = {name: tuple(t.shape) for name, t in empty(lambda: SanaTransformer2DModel(config)).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        name = min(set(found.items()) ^ set(expected.items()))[0]
        raise ValueError(
            f"{source}, {name!r}: got shape {found.get(name)}; the model has {expected.get(name)}. Is the config its own?"
        )


def convert(source: Path, out: Path, config_file: Path | None, dtype: str, which: str | None) -> str:
    """Returns what was written, for people. Raises ValueError, SanaError and OSError, said for people too."""
    if out.exists():
        raise ValueError(f"{out}: got a name that is taken; expected a new one. Nothing is overwritten.")
    is_ours = checkpoint.is_sharded(source) or (source / "model.safetensors").is_file()
    if not is_ours and not (source / FILE).is_file():
        raise FileNotFoundError(f"{source}: got neither a training checkpoint (.metadata or state.json) nor {FILE}; expected one")
    config = _config(source, config_file)
    if not is_ours:
        weights = load_file(source / FILE)
        _check(source / FILE, weights, config)
        checkpoint.save(out, {f"model.{name}": tensor.float() for name, tensor in weights.items()})
        return f"{out}: distributed checkpoint, weights only"
    weights, what = _weights(source, which)
    _check(source, weights, config)
    part = out.with_name(f".{out.name}.writing")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: t.to(DTYPES[dtype]).contiguous() for name, t in weights.items()}, part / FILE, metadata={"format": "pt"})
    values = {"_class_name": "SanaTransformer2DModel", **asdict(config)}
    (part / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out)
    return f"{out}: {FILE}, the {what} in {dtype}, {(out / FILE).stat().st_size / 1e6:.1f} MB"


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
    command.add_argument("--weights", choices=("ema", "model"), help="default: the average if there is one")
    options = parser.parse_args(arguments)
    try:
        print(convert(options.source, options.out, options.config, options.dtype, options.weights))
    except (SanaError, ValueError, OSError) as error:
        print(f"checkpoint: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
