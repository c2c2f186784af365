"""What an invocation of `train.tiny` leaves in its output folder, and the pictures to look at."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from train.tiny import recogniser
from train.tiny.captions import COLOUR_NAMES
from train.tiny.evaluate import grid, grid_captions
from train.tiny.models import FLOW_SHIFT
from train.tiny.tiny_run import Run


def deliver(run: Run) -> None:
    """Write what there is to the output folder: weights as exported, one JSON, picture grids."""
    out: Path = run.args.out
    for name in ("vae", "transformer", "text_encoder", "recogniser"):
        if run.has(name):
            (out / f"{name}.safetensors").write_bytes((run.work / f"{name}.safetensors").read_bytes())
    if (run.work / "grid_vae.png").is_file():
        (out / "grid_vae.png").write_bytes((run.work / "grid_vae.png").read_bytes())
    if run.has("transformer") and run.has("vae"):
        texts = grid_captions(run.names, 8 if run.args.smoke else 64)
        painter = run.painter()
        grid(painter.draw(texts, seed=11), texts, out / "grid_256.png")
        wide = texts[: len(texts) // 4]
        grid(painter.draw(wide, seed=12, width=320, height=192), wide, out / "grid_320x192.png", columns=4)
    record = {
        "metrics": run.metrics,
        "configs": {**run.configs, "recogniser": recogniser.RECOGNISER},
        "flow_shift": FLOW_SHIFT,
        "names": run.names,
        "characters": run.sprites.characters,
        "colours": list(COLOUR_NAMES),
        "tokenizer": json.loads(run.sprites.tokenizer_json),
        "log": run.log.lines,
        "arguments": {name: str(value) for name, value in vars(run.args).items()},
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
    }
    (out / "tiny.json").write_text(json.dumps(record, ensure_ascii=False))
    run.log(f"delivered: {', '.join(f'{p.name} {p.stat().st_size / 1e6:.2f} MB' for p in sorted(out.iterdir()))}")
