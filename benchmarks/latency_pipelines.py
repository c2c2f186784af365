"""A picture as users of diffusers draw it: its own pipeline from a new prompt to the bytes of a PNG, eagerly or by torch.compile.

A call does what diffusers does unless told otherwise: it encodes the empty negative prompt too, which ours remembers, draws noise
where the networks are, and has Pillow write the PNG, as `picture.save` does, on one core; what that takes is in the peer's note.
Nothing is tiled, and a size is taken as asked for.

Before it is timed a pipeline draws pictures from our noise, and they are compared with those that PyTorch draws in the wider type:
as a whole, because right parts may be put together wrongly, with another schedule, instruction or guidance. That costs two requests
to sana_ref, one of them in fp32.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.large_convolutions import ConvolutionsByRows
from benchmarks.latency_parity import picture_error, wider
from benchmarks.latency_peers import PEERS, Peer, attempted, check_layout, free
from benchmarks.latency_timing import Task, TorchEvents, cpu_clock
from benchmarks.latency_work import SEED, Work, new_prompts
from engines.errors import ParityError
from engines.spec import PX_PER_LATENT
from runtime.noise import normal_batch
from sana_ref.checkpoint import Checkpoint
from sana_ref.pipeline import SanaReference, component_dtypes

__all__ = ["checked_pipelines"]

MIDDLE = 1.3  # of Sprint's two steps; diffusers refuses it for another number


@contextmanager
def checked_pipelines(
    folder: Path,
    checkpoint: Checkpoint,
    work: Work,
    modes: Sequence[str],
    *,
    dtype: torch.dtype,
    device: str,
    say: Callable[[str], object] = print,
) -> Iterator[dict[str, Peer]]:
    """As latency_peers.checked_peers, of pictures. They are compared by the wall clock: what the device's time would leave out, the
    host's work between kernels, is a part of a picture.

    work: a picture. dtype: of the transformer; beside fp16 the others are bf16, as published, for they overflow.
    """
    if not modes:
        yield {}
        return
    check_layout(folder)
    exact = _reference(checkpoint, work, wider(dtype), device)
    same = _reference(checkpoint, work, dtype, device)
    peers: dict[str, Peer] = {}
    try:
        for mode in modes:
            pipeline = partial(_Pipeline, folder, checkpoint, work, dtype, device, None if mode == "eager" else mode)
            peers |= attempted("picture", PEERS[mode], partial(_checked, PEERS[mode], pipeline, exact, same), say, device)
        yield peers
    finally:
        peers.clear()
        free(device)


def _checked(name: str, make: Callable[[], _Pipeline], exact: Tensor, same: Tensor) -> Peer:
    """Raises ParityError if it draws something else."""
    pipeline = make()
    for _ in range(3):  # the third picture of a compiled one is the first that only replays CUDA graphs
        pipeline()
    rms, wrong = picture_error(pipeline.checked(), exact, same, fp32=pipeline.dtype == torch.float32)
    if wrong:
        raise ParityError("; ".join(wrong))
    stopwatch = TorchEvents() if pipeline.device == "cuda" else cpu_clock
    return Peer(Task(name, pipeline, stopwatch, by_wall=True, note=pipeline.note), rms)


def _checked_prompts(work: Work) -> list[str]:
    return new_prompts(work.batch)()


def _latents(checkpoint: Checkpoint, work: Work) -> Tensor:
    """Ours for SEED."""
    grid = (checkpoint.transformer_config.in_channels, work.height // PX_PER_LATENT, work.width // PX_PER_LATENT)
    return torch.from_numpy(normal_batch(range(SEED, SEED + work.batch), grid))


def _reference(checkpoint: Checkpoint, work: Work, dtype: torch.dtype, device: str) -> Tensor:
    """What PyTorch's decoder gives in the end, (B, 3, H, W), on the CPU. Its memory is free afterwards."""
    reference = SanaReference(checkpoint, dtype=dtype, device=device)
    latents, guidance = _latents(checkpoint, work), checkpoint.sampler.guidance_scale
    generator = torch.Generator().manual_seed(SEED)  # Sprint's noise, a step after the other, as _Pipeline.checked() has it
    sampled = reference.sample(
        reference.encode_text(_checked_prompts(work), "", guidance),
        reference.schedule(steps=work.steps),
        latents=latents,
        guidance=guidance,
        noise=lambda step: torch.randn(latents.shape, generator=generator),
    )
    with ConvolutionsByRows():
        images = reference.decode(sampled).cpu()
    del reference, sampled
    free(device)
    return images


class _Pipeline:
    """The class that model_index.json names, with all of the checkpoint's parts. A call returns the PNGs of new prompts."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, work: Work, dtype: torch.dtype, device: str, mode: str | None) -> None:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging

        diffusers_logging.disable_progress_bar()
        logging.disable_progress_bar()
        types = component_dtypes(dtype)
        self._pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, dtype={"transformer": types["transformer"], "default": types["vae"]}, local_files_only=True
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.text_encoder.config.use_cache = False  # nothing reads its keys and values
        if mode is not None:
            for module in (self._pipeline.text_encoder, self._pipeline.transformer, self._pipeline.vae.decoder):
                module.forward = _compiled(module.forward, mode)
        self.dtype, self.device, self._checkpoint, self._work = dtype, device, checkpoint, work
        self._prompts, self._png_ms = new_prompts(work.batch), list[float]()
        prompt = checkpoint.prompt
        self._settings: dict[str, Any] = {
            "num_inference_steps": work.steps,
            "guidance_scale": checkpoint.sampler.guidance_scale,
            "width": work.width,
            "height": work.height,
            "use_resolution_binning": False,
            "max_sequence_length": prompt.max_sequence_length,
            "complex_human_instruction": [prompt.complex_human_instruction] if prompt.complex_human_instruction else None,
        }
        if checkpoint.transformer_config.guidance_embeds:
            self._settings["intermediate_timesteps"] = MIDDLE if work.steps == 2 else None

    def __call__(self) -> list[bytes]:
        generator = torch.Generator(self.device).manual_seed(SEED)
        return self._draw(self._prompts(), generator=generator)

    def note(self) -> str:
        """Median of all calls, those before it is timed too."""
        return f"PNG by Pillow {statistics.median(self._png_ms):.1f} ms"

    def checked(self) -> Tensor:
        """What its decoder gives for the reference's prompts and noise, before 8 bits hide small errors."""
        decoded: list[Tensor] = []
        hook = self._pipeline.vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output.cpu()))
        try:
            latents, generator = _latents(self._checkpoint, self._work), torch.Generator().manual_seed(SEED)
            self._draw(_checked_prompts(self._work), latents=latents, generator=generator)
        finally:
            hook.remove()
        return torch.cat(decoded)

    def _draw(self, prompts: list[str], **noise: Any) -> list[bytes]:
        pictures = self._pipeline(prompt=prompts, **self._settings, **noise).images
        began = time.perf_counter()
        files = [_png(picture) for picture in pictures]
        self._png_ms.append(1000 * (time.perf_counter() - began))
        return files


def _compiled(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Every text has as many tokens as all, so shapes are few."""
    call = torch.compile(forward, mode=mode, dynamic=False)

    def marked(*arguments: Any, **more: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the pipeline has read, or copied, what the last call of any returned
        return call(*arguments, **more)

    return marked


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
