"""Writes the measured numbers into README.md, between its two markers: `python benchmarks/tables.py`.

The newest line of each figure counts. With --check nothing is written, and the exit code is 1 if README.md is not up to date.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.figures import FIGURES, ROOT

BEGIN, END = "<!-- figures: written by benchmarks/tables.py -->\n", "<!-- end of figures -->"
WORDS = {  # figure: what it is, in the order of the table
    "tiny_picture_cpu_s": "sana-tiny, prompt to PNG, 512 px, 20 steps, ONNX Runtime",
    "tiny_picture_gpu_ms": "sana-tiny, prompt to PNG, 512 px, 20 steps, TensorRT",
    "tiny_scene_single": "sana-tiny, scene score, captions kept out: one object",
    "tiny_scene_two": "… both of two objects",
    "tiny_scene_counting": "… two or three of an object",
    "tiny_scene_colour": "… the background",
    "tiny_scene_position": "… left, right, above, below",
    "tiny_scene_language": "… other languages than English",
    "tiny_dcae_full_psnr_db": "sana-tiny's DC-AE, Full: scenes kept out, PSNR",
    "tiny_dcae_lite_psnr_db": "… with the Lite decoder",
    "step_1600m_1024px_fp16_ms": "Sana-1.6B, one denoiser step with guidance, 1024 px, fp16",
    "step_1600m_1024px_fp8_ms": "… in FP8",
    "step_1600m_2048px_fp16_ms": "… 2048 px",
    "step_1600m_2048px_fp8_ms": "… 2048 px, in FP8",
    "step_1600m_4096px_fp16_ms": "… 4096 px",
    "step_1600m_4096px_fp8_ms": "… 4096 px, in FP8",
    "step_600m_1024px_fp16_ms": "Sana-0.6B, the same, 1024 px",
    "step_600m_1024px_fp8_ms": "… in FP8",
    "step_ratio_fp8": "Sana-1.6B, one denoiser step in FP8, of fp16's time in the same run, 1024 px",
    "step_ratio_int8": "… in INT8",
    "step_ratio_2048px_fp8": "… in FP8, 2048 px",
    "step_ratio_4096px_fp8": "… in FP8, 4096 px",
    "decode_1024px_bf16_ms": "DC-AE decode, 1024 px, bf16",
    "decode_1024px_fp8_ms": "… in FP8",
    "decode_1024px_int8_ms": "… in INT8",
    "decode_4096px_bf16_ms": "DC-AE decode, 4096 px, no tiles, bf16",
    "decode_4096px_bf16_peak_gb": "DC-AE decode, 4096 px, no tiles, bf16: peak memory of the GPU",
    "encode_text_bf16_ms": "Gemma-2-2B, two texts of 300 tokens, bf16",
    "encode_text_instructed_bf16_ms": "… with their instruction",
    "picture_1600m_1024px_20step_fp8_ms": "Sana-1.6B, prompt to PNG, 20 steps, 1024 px, FP8",
    "sprint_1600m_1024px_1step_gpu_ms": "Sana-Sprint-1.6B, prompt to PNG, one step, 1024 px: the GPU's time",
    "sprint_1600m_1024px_1step_wall_ms": "… all of it",
    "start_1600m_s": "Sana-1.6B, from SanaEngine(bundle) to the first picture, kernels compiled before",
    "peak_1600m_1024px_fp16_gb": "… peak memory of the GPU",
    "peak_1600m_1024px_low_memory_gb": "… with low_memory",
    "cpp_tiny_start_s": "sana-tiny in C++ and in Python (peer), 512 px: from opening the bundle to the first picture, TensorRT",
    "cpp_tiny_picture_ms": "… a further picture of 20 steps",
    "cpp_tiny_peak_mb": "… peak memory of the host",
    "launches_per_picture": "Sana-1.6B, graph launches a picture",
    "kernels_per_step": "… kernels a step",
    "host_per_step_ms": "… what a step costs on the host beyond the GPU's time and the launch",
    "quant_int8_scene_points_lost": "sana-tiny in INT8: scene score lost, of 100 points",
    "quant_int8_psnr_db": "… PSNR to the unquantised model's pictures",
    "quant_int8_lpips": "… LPIPS to the unquantised model's pictures",
    "quant_int8_size_ratio": "Sana-1.6B in INT8: the denoiser's weights, of fp16's",
    "quant_int8_memory_ratio": "… the GPU memory of the whole pipeline at 1024 px, of fp16's, reckoned",
    "quant_fp8_scene_points_lost": "sana-tiny in FP8: scene score lost, of 100 points",
    "quant_fp8_psnr_db": "… PSNR to the unquantised model's pictures",
    "quant_fp8_lpips": "… LPIPS to the unquantised model's pictures",
    "quant_fp8_size_ratio": "Sana-1.6B in FP8: the denoiser's weights, of fp16's",
    "quant_fp8_memory_ratio": "… the GPU memory of the whole pipeline at 1024 px, of fp16's, reckoned",
    "quant_nvfp4_scene_points_lost": "sana-tiny in NVFP4: scene score lost, of 100 points",
    "quant_nvfp4_psnr_db": "… PSNR to the unquantised model's pictures",
    "quant_nvfp4_lpips": "… LPIPS to the unquantised model's pictures",
    "quant_nvfp4_size_ratio": "Sana-1.6B in NVFP4: the denoiser's weights, of fp16's",
    "quant_nvfp4_memory_ratio": "… the GPU memory of the whole pipeline at 1024 px, of fp16's, reckoned",
    "train_1600m_mfu": "Sana-1.6B training, 1024 px, bf16, one GPU: share of the GPU's peak FLOP rate",
    "train_scaling_2gpu_fsdp": "… on two GPUs, FSDP2: times one GPU's pictures a second",
    "train_scaling_2gpu_ddp": "… on two GPUs, DDP",
    "build_1600m_fp16_s": "Sana-1.6B, checkpoint to bundle, no GPU",
    "build_1600m_fp16_peak_gb": "Sana-1.6B, checkpoint to bundle, peak memory",
    "demo_fresh_clone_s": "`make demo` on a fresh clone",
}


def newest(path: Path = FIGURES) -> dict[str, dict[str, Any]]:
    """The last line of each figure; of those of its commit the last that has peers, beside the floor, if there is one."""
    found: dict[str, dict[str, Any]] = {}
    for row in (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()):
        before = found.get(row["figure"])
        if before is None or row["commit"] != before["commit"] or has_peers(row) >= has_peers(before):
            found[row["figure"]] = row
    return found


def has_peers(row: dict[str, Any]) -> bool:
    return bool(set(row["peer"]) - {"floor"})


def number(value: float, unit: str) -> str:
    """With its unit; a share has none."""
    return f"{value:.3f}" if unit == "share" else f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = ["| what | measured | beside it | where, when |", "|---|---|---|---|"]
    notes: list[str] = []
    for name, words in WORDS.items():
        row = figures.get(name)
        if row is None:
            continue
        peers = "; ".join(f"{peer.replace('_', ' ')} {number(value, row['unit'])}" for peer, value in row["peer"].items())
        mark = ""
        if row["note"]:
            if row["note"] not in notes:
                notes.append(row["note"])
            mark = f" [{notes.index(row['note']) + 1}]"
        lines.append(f"| {words}{mark} | {number(row['value'], row['unit'])} | {peers} | {row['machine']}, {row['date']} |")
    return "\n".join(lines + [""] + [f"[{index}] {note}.  " for index, note in enumerate(notes, 1)]) + "\n"


def updated(readme: str, figures: dict[str, dict[str, Any]]) -> str:
    """Raises ValueError if README.md has lost its markers."""
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:start]}\n{table(figures)}\n{readme[end:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before, newest())
    if options.check:
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
