"""How long a bundle takes on this GPU, next to diffusers with the same weights in the same run, and how exact it is.

    python benchmarks/latency.py --bundle out/sana --model CHECKPOINT --width 1024 --height 1024 --record

Correctness first: with the same inputs, the engine's error against PyTorch in fp32 may be at most twice that of PyTorch at the
engine's precision. If it is more, nothing is timed and the exit code is 1. Then medians: steps and decode as the runtime runs them
(CUDA events between them, all steps of several pictures), diffusers' transformer and decoder eagerly, called as its pipeline calls
them. --record appends the figures to benchmarks/results/figures.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import record
from engines import tensorrt
from engines.parity_report import ErrorStats, bound_from, check, measure
from engines.spec import ComponentName
from runtime import SanaEngine
from runtime.image import save_png
from runtime.noise import normal
from runtime.schedule import make_schedule
from sana_ref.checkpoint import Checkpoint, load
from sana_ref.components import DecoderForExport
from sana_ref.step import DenoiserStep

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP, CALLS = 5, 50
# Said beside every figure of a combination that NVIDIA does not support.
UNSUPPORTED = "TensorRT for RTX on compute capability 9.0: works, but is not a combination that NVIDIA supports"
PROMPT = "a lighthouse on a cliff at dusk"


def median_ms(call: Callable[[], Any], calls: int = CALLS) -> float:
    """Of the GPU's time between the start and end of a call, each timed alone, after warm-up."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def step_inputs(engine: SanaEngine, width: int, height: int) -> dict[str, np.ndarray]:
    """One step in the middle of a schedule with guidance, as the denoiser's graph takes it. The text is noise of unit variance."""
    manifest = engine.manifest
    channels, length = manifest.latents.channels, manifest.prompt.max_sequence_length
    grid = (channels, height // 32, width // 32)
    info = manifest.schedule
    table = make_schedule(info.scheduler, 20, flow_shift=info.flow_shift, timestep_scale=info.timestep_scale).table
    mask = np.ones((2, 1, length), np.float32)
    mask[0, :, 1:] = 0  # the empty negative prompt
    mask[1, :, 40:] = 0
    return {
        "latents": normal(1, grid)[None],
        "previous": normal(2, grid)[None],
        "coefficients": table[10],
        "guidance_weights": np.array([1 - info.guidance_scale, info.guidance_scale], np.float32),
        "prompt_embeds": normal(3, (2, length, manifest.caption_channels))[:, None],
        "prompt_mask": mask,
    }


def errors(engine_out: np.ndarray, exact: Tensor, same: Tensor) -> dict[str, ErrorStats]:
    reference = exact.double().cpu().numpy()
    return {"engine": measure(engine_out, reference), "pytorch": measure(same.double().cpu().numpy(), reference)}


@torch.inference_mode()
def denoiser_errors(engine: SanaEngine, checkpoint: Checkpoint, inputs: dict[str, np.ndarray]) -> dict[str, ErrorStats]:
    with engine.session("denoiser") as session:
        got = session.run(inputs)["next_latents"]
    outputs = []
    for dtype in (torch.float32, DTYPES[engine.manifest.precision["denoiser"]]):
        step = DenoiserStep(checkpoint.transformer(dtype, "cuda"))
        outputs.append(step(*(torch.from_numpy(inputs[name]).cuda() for name in step.input_names))[0])
        del step
        torch.cuda.empty_cache()
    return errors(got, *outputs)


@torch.inference_mode()
def decoder_errors(engine: SanaEngine, checkpoint: Checkpoint, latents: np.ndarray) -> dict[str, ErrorStats]:
    with engine.session("decoder") as session:
        got = session.run({"latents": latents})["images"]
    outputs = []
    for dtype in (torch.float32, DTYPES[engine.manifest.precision["decoder"]]):
        decoder = DecoderForExport(checkpoint.vae(dtype, "cuda"))
        outputs.append(decoder(torch.from_numpy(latents).cuda()))
        del decoder
        torch.cuda.empty_cache()
    return errors(got, *outputs)


@torch.inference_mode()
def diffusers_step_ms(model: Path, inputs: dict[str, np.ndarray], dtype: torch.dtype) -> float:
    """diffusers' transformer, eagerly, on the same batch of two, without guidance's and the sampler's arithmetic."""
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel.from_pretrained(model / "transformer", torch_dtype=dtype).cuda().eval()
    latents = torch.from_numpy(inputs["latents"]).cuda().to(dtype).expand(2, -1, -1, -1).contiguous()
    text = torch.from_numpy(inputs["prompt_embeds"][:, 0]).cuda().to(dtype)
    mask = torch.from_numpy(inputs["prompt_mask"][:, 0]).cuda()
    timestep = torch.full((2,), float(inputs["coefficients"][0]), device="cuda")
    return median_ms(lambda: transformer(latents, text, timestep, encoder_attention_mask=mask, return_dict=False))


@torch.inference_mode()
def diffusers_decode_ms(model: Path, latents: np.ndarray, dtype: torch.dtype) -> float:
    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(model / "vae", torch_dtype=dtype).cuda().eval()
    z = torch.from_numpy(latents).cuda().to(dtype) / vae.config.scaling_factor
    return median_ms(lambda: vae.decode(z, return_dict=False))


def picture_times(engine: SanaEngine, width: int, height: int, steps: int, pictures: int) -> dict[str, Any]:
    """Medians over `pictures` requests of one picture, after two for warm-up; and whether all had the same bytes."""
    rows: list[tuple[list[float], float, float]] = []
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures + 2):
            began = time.perf_counter()
            picture = engine.generate(PROMPT, seed=5, steps=steps, width=width, height=height)[0]
            save_png(picture, Path(folder) / "picture.png")
            wall = time.perf_counter() - began
            digests.add(hashlib.sha256(picture.tobytes()).hexdigest())
            timings = engine.last_timings[0]
            if number >= 2:
                rows.append((list(timings.steps_s), timings.decode_s, wall))
    return {
        "step_ms": 1000 * statistics.median(s for steps_s, _, _ in rows for s in steps_s),
        "decode_ms": 1000 * statistics.median(decode for _, decode, _ in rows),
        "gpu_ms": 1000 * statistics.median(sum(steps_s) + decode for steps_s, decode, _ in rows),
        "wall_ms": 1000 * statistics.median(wall for _, _, wall in rows),
        "same_bytes": len(digests) == 1,
    }


def size_name(checkpoint: Checkpoint) -> str:
    """ "1600m", or "tiny" below 100 million parameters."""
    count = sum(int(np.prod(shape)) for shape in checkpoint.sources["transformer"].shapes.values())
    return "tiny" if count < 100e6 else f"{round(count / 1e8) * 100}m"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder, for PyTorch and diffusers")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--note", default="", help="said beside the figures, for example: random weights")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is the truth here
    torch.backends.cudnn.benchmark = True  # for the peer's sake: its convolutions get the best algorithm

    checkpoint = load(args.model)
    size = size_name(checkpoint)
    with SanaEngine(args.bundle, backend="tensorrt") as engine:
        manifest = engine.manifest
        width, height = args.width or manifest.ranges.opt_side, args.height or manifest.ranges.opt_side
        inputs = step_inputs(engine, width, height)
        latents = normal(4, inputs["latents"].shape[1:])[None] * np.float32(manifest.latents.scaling_factor)
        found = {"denoiser": denoiser_errors(engine, checkpoint, inputs), "decoder": decoder_errors(engine, checkpoint, latents)}
        wrong = [f"{name}: {text}" for name, e in found.items() for text in check(e["engine"], bound_from(e["pytorch"]))]
        print(json.dumps({name: {who: e.model_dump() for who, e in rows.items()} for name, rows in found.items()}))
        if wrong:
            print("\n".join(["the engine is not exact enough; nothing is timed", *wrong]))
            return 1
        times = picture_times(engine, width, height, args.steps, args.pictures)
        if not times["same_bytes"]:
            print("the same request gave different pictures; nothing is recorded")
            return 1
        precision = manifest.precision
    peers = {
        "step": diffusers_step_ms(args.model, inputs, DTYPES[precision["denoiser"]]),
        "decode": diffusers_decode_ms(args.model, latents, DTYPES[precision["decoder"]]),
    }
    print(json.dumps(times | {f"diffusers_eager_{name}_ms": value for name, value in peers.items()}, indent=1))
    if args.record:
        note = UNSUPPORTED if torch.cuda.get_device_capability() == (9, 0) else ""
        keep = functools.partial(record, unit="ms", extra_versions={"tensorrt": f"{tensorrt.flavor()} {tensorrt.version()}"})
        px = f"{width}px" if width == height else f"{width}x{height}px"
        names = {"denoiser": f"step_{size}_{px}", "decoder": f"decode_{px}" if size != "tiny" else f"decode_tiny_{px}"}
        stages: tuple[tuple[ComponentName, str], ...] = (("denoiser", "step"), ("decoder", "decode"))
        for component, stage in stages:
            ratio = found[component]["engine"].rms / found[component]["pytorch"].rms
            keep(
                f"{names[component]}_{precision[component]}_ms",
                times[f"{stage}_ms"],
                peer={"diffusers_eager": round(peers[stage], 4)},
                note="; ".join(filter(None, (f"rms error {ratio:.2f} x PyTorch's", args.note, note))),
            )
        if size == "tiny":
            keep("tiny_picture_gpu_ms", times["wall_ms"], note=f"{args.steps} steps, {px}, prompt to PNG; {note}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
