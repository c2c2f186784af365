"""Correctness before speed: how far the engine, and each peer, is from PyTorch in a wider precision, with the same inputs.

The bound is the project's: twice the error of PyTorch at the precision in question.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from apps.cli.inspect import read_report
from apps.cli.verify import measure_component
from benchmarks.large_convolutions import ConvolutionsByRows
from benchmarks.latency_plan import bundle_plan
from benchmarks.latency_work import Arrays
from engines.bundle import Bundle
from engines.errors import MissingFileError
from engines.parity_report import FACTOR, Bound, ErrorStats, bound_from, check, check_size, measure
from engines.spec import QUANTIZED, ComponentName, Precision
from sana_ref.checkpoint import Checkpoint
from sana_ref.components import DecoderForExport, TextEncoderForExport
from sana_ref.quantize_ops import Rows
from sana_ref.quantized import QuantizedLinears
from sana_ref.quantized_convs import MARGINS, ConvRanges, QuantizedConvs, conv_plan
from sana_ref.step import DenoiserStep

if TYPE_CHECKING:
    from runtime import SanaEngine

__all__ = ["dtype_of", "engine_errors", "golden_complaints", "network_output", "peer_error", "picture_error", "wider"]

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DTYPES |= dict.fromkeys(map(str, (Precision.FP16, *QUANTIZED)), torch.float16)
FP32_CLOSE = 1e-5  # relative; how closely sana_ref and diffusers agree in fp32, by tests/parity
MAIN_OUTPUT: Mapping[str, str] = {"text_encoder": "prompt_embeds", "denoiser": "next_latents", "decoder": "images"}


def dtype_of(component: str, precision: str) -> torch.dtype:
    """Of PyTorch beside it; for int8, fp8 and nvfp4 also of peers, who have nothing narrower. The decoder overflows in fp16."""
    return torch.bfloat16 if component == "decoder" and precision in QUANTIZED else _DTYPES[precision]


def wider(dtype: torch.dtype) -> torch.dtype:
    """What is taken as exact beside `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _tensors(inputs: Arrays, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """fp64 inputs for an fp64 model; else as they are."""
    found = {name: torch.tensor(array, device=device) for name, array in inputs.items()}
    return {name: x.double() if dtype == torch.float64 and x.is_floating_point() else x for name, x in found.items()}


def _release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def _graph_output(
    component: ComponentName, checkpoint: Checkpoint, inputs: Arrays, dtype: torch.dtype, device: str, like: Bundle | None = None
) -> Tensor:
    """What the reference makes of a component's inputs: the first output of the bundle's graph.

    like: with the roundings of this bundle's layers. A decoder's in FP8 or INT8 are of its residual blocks' convolutions, whose
    scales are made as a build makes them without a calibration, from these inputs.
    """
    x = _tensors(inputs, device, dtype)
    if component == "denoiser":
        step = DenoiserStep(checkpoint.transformer(dtype, device))
        x |= {name: x[name].to(dtype) for name in ("text_keys", "text_values")}
        names = [name for name, _ in step.transformer.named_parameters()]
        plan = None if like is None else bundle_plan(like, names, device)
        with nullcontext() if plan is None else QuantizedLinears(step.transformer, plan):
            return step(*(x[name] for name in step.input_names))[0]
    if component == "decoder" and like is not None and like.manifest.precision[component] in QUANTIZED:
        kind: Rows = "int8" if like.manifest.precision[component] == Precision.INT8 else "fp8"
        decoder = DecoderForExport(checkpoint.vae(dtype, device))
        with ConvRanges(decoder) as ranges, ConvolutionsByRows():
            decoder(x["latents"])
        with QuantizedConvs(decoder, conv_plan(kind, ranges.largest(), MARGINS[kind])), ConvolutionsByRows():
            return decoder(x["latents"])
    return network_output(component, checkpoint, inputs, dtype, device)


@torch.inference_mode()
def network_output(component: ComponentName, checkpoint: Checkpoint, inputs: Arrays, dtype: torch.dtype, device: str) -> Tensor:
    """What the reference's network makes of them, as peers have it: of the denoiser the velocities (k B, C, h, w), without
    guidance and the sampler's update; else as the bundle's graph."""
    x = _tensors(inputs, device, dtype)
    if component == "denoiser":
        transformer = checkpoint.transformer(dtype, device)
        texts, batch = x["prompt_embeds"].shape[:2]
        guidance = None
        if "guidance_scale" in x:
            guidance = (x["guidance_scale"] * transformer.config.guidance_embeds_scale).expand(texts * batch)
        latents = (x["coefficients"][1] * x["latents"]).to(dtype)
        return transformer(
            latents[None].expand(texts, -1, -1, -1, -1).flatten(0, 1),
            x["prompt_embeds"].to(dtype).flatten(0, 1),
            x["coefficients"][0].expand(texts * batch),
            x["prompt_mask"].flatten(0, 1),
            guidance,
        )
    if component == "decoder":
        with ConvolutionsByRows():
            return DecoderForExport(checkpoint.vae(dtype, device))(x["latents"])
    length = checkpoint.prompt.max_sequence_length
    return TextEncoderForExport(checkpoint.text_encoder(dtype, device), length)(x["input_ids"], x["attention_mask"])


def _array(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def engine_errors(
    engine: SanaEngine, component: ComponentName, checkpoint: Checkpoint, inputs: Arrays, device: str = "cuda"
) -> dict[str, ErrorStats]:
    """ "engine" and "pytorch", which has the component's precision and roundings; both against a wider PyTorch."""
    with engine.session(component) as session:
        got = session.run(inputs)[MAIN_OUTPUT[component]]
    dtype = dtype_of(component, engine.manifest.precision[component])
    exact = _array(_graph_output(component, checkpoint, inputs, wider(dtype), device))
    _release(device)
    same = _array(_graph_output(component, checkpoint, inputs, dtype, device, like=engine.bundle))
    _release(device)
    return {"engine": measure(got, exact), "pytorch": measure(same, exact)}


def golden_complaints(engine: SanaEngine) -> list[str]:
    """What is wrong by the bundle's own golden inputs and bounds, as `sana verify` has it: no checkpoint is needed.

    Raises MissingFileError if the bundle has no parity.json.
    """
    report = read_report(engine.bundle)
    if report is None:
        raise MissingFileError(f"{engine.bundle.path}: no parity.json, hence no bounds. Rebuild, or give --model.")
    return [
        f"{component}, {found.output}, case {found.case!r}: {sentence}"
        for component in engine.manifest.components
        for found in measure_component(engine, report, component)
        for sentence in found.wrong
    ]


def peer_error(got: Tensor, exact: Tensor, same: Tensor, *, fp32: bool) -> tuple[float, list[str]]:
    """A peer's rms error, and what is wrong with it: empty if it is within its bound. fp32: it computes in that."""
    reference = _array(exact)
    found, pytorch = measure(_array(got), reference), measure(_array(same), reference)
    bound = bound_from(pytorch)
    if fp32:  # there only the order of sums differs, and that by more than twice
        return found.rms, check_size(found, Bound(rms=max(bound.rms, FP32_CLOSE), max=max(bound.max, FP32_CLOSE)))
    return found.rms, check(found, bound)


def picture_error(got: Tensor, exact: Tensor, same: Tensor, *, fp32: bool) -> tuple[float, list[str]]:
    """As peer_error, of whole pictures, by rms alone: after many steps an error is a picture that moved a little, whose largest is
    one pixel's at an edge, and whose mean may be a shade's."""
    reference = _array(exact)
    rms, most = measure(_array(got), reference).rms, FACTOR * measure(_array(same), reference).rms
    most = max(most, FP32_CLOSE) if fp32 else most
    why = "by PyTorch's own at the same precision"
    return rms, [] if rms <= most else [f"rms error: got {rms:.3e}; expected at most {most:.3e}, {why}"]
