"""The same component as others run it: diffusers' modules (transformers' for the text encoder), eagerly and through torch.compile.

Each has the checkpoint's weights, the bundle's precision and the same inputs, and is called as diffusers' pipeline calls it. Of the
denoiser a peer does less than ours: neither guidance nor the sampler's update. A peer is checked before it is timed. Pictures have
theirs in latency_pipelines.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.latency_parity import network_output, peer_error, wider
from benchmarks.latency_timing import Task, TorchEvents, cpu_clock
from benchmarks.latency_work import Arrays
from engines.errors import ParityError, RequestError
from engines.spec import ComponentName, nearest
from sana_ref.checkpoint import Checkpoint
from sana_ref.components import select_tokens

__all__ = ["PEERS", "Peer", "attempted", "check_layout", "checked_peers", "free", "parse_peers"]

# On the command line: in records and figures.
PEERS = {
    "eager": "diffusers_eager",
    "reduce-overhead": "torch_compile_reduce_overhead",
    "max-autotune": "torch_compile_max_autotune",
}
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    task: Task
    rms_error: float


def parse_peers(text: str) -> list[str]:
    """ "eager,max-autotune" as a list; "none" as an empty one. Raises RequestError for another word."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["none"]:
        return []
    if wrong := [word for word in words if word not in PEERS]:
        raise RequestError(f"--peers: got {', '.join(wrong)}; {nearest(wrong[0], (*PEERS, 'none'))}.")
    return list(dict.fromkeys(words))


def _denoiser(folder: Path, checkpoint: Checkpoint, x: dict[str, Tensor], dtype: torch.dtype, mode: str | None) -> Forward:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).to(x["latents"].device).eval()
    texts, batch = x["prompt_embeds"].shape[:2]
    count = texts * batch
    latents = (x["coefficients"][1] * x["latents"]).to(dtype)[None].expand(texts, -1, -1, -1, -1).flatten(0, 1).contiguous()
    text, mask = x["prompt_embeds"].to(dtype).flatten(0, 1), x["prompt_mask"].flatten(0, 1)
    timestep = x["coefficients"][0].expand(count).contiguous()
    more = {}
    if "guidance_scale" in x:
        more["guidance"] = (x["guidance_scale"] * model.config.guidance_embeds_scale).expand(count).contiguous()
    call = model if mode is None else torch.compile(model, mode=mode, dynamic=False)
    return lambda: call(latents, text, timestep, encoder_attention_mask=mask, return_dict=False, **more)[0]


def _decoder(folder: Path, checkpoint: Checkpoint, x: dict[str, Tensor], dtype: torch.dtype, mode: str | None) -> Forward:
    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=dtype).to(x["latents"].device).eval()
    z = x["latents"].to(dtype) / vae.config.scaling_factor
    if mode is not None:
        vae.decoder = torch.compile(vae.decoder, mode=mode, dynamic=False)
    return lambda: vae.decode(z, return_dict=False)[0]


def _text_encoder(folder: Path, checkpoint: Checkpoint, x: dict[str, Tensor], dtype: torch.dtype, mode: str | None) -> Forward:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    model = AutoModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(x["input_ids"].device).eval()
    ids, mask, length = x["input_ids"], x["attention_mask"], checkpoint.prompt.max_sequence_length
    call = model if mode is None else torch.compile(model, mode=mode, dynamic=False)
    return lambda: select_tokens(call(ids, attention_mask=mask, use_cache=False, return_dict=False)[0], length)


MAKERS: dict[ComponentName, Callable[..., Forward]] = {
    "denoiser": _denoiser,
    "decoder": _decoder,
    "text_encoder": _text_encoder,
}


@contextmanager
def checked_peers(
    component: ComponentName,
    folder: Path,
    checkpoint: Checkpoint,
    inputs: Arrays,
    modes: Sequence[str],
    *,
    dtype: torch.dtype,
    device: str,
    say: Callable[[str], object] = print,
) -> Iterator[dict[str, Peer]]:
    """Peers that are as exact as PyTorch is, by the names that records have. What is wrong with others is said, and they are not
    among them. Their memory is free afterwards.

    folder: the checkpoint in diffusers' layout. modes: keys of PEERS.
    """
    if not modes:
        yield {}
        return
    check_layout(folder)
    exact = network_output(component, checkpoint, inputs, wider(dtype), device).cpu()
    same = network_output(component, checkpoint, inputs, dtype, device).cpu()
    free(device)
    peers: dict[str, Peer] = {}
    try:
        for mode in modes:
            make = partial(_checked, component, folder, checkpoint, inputs, mode, exact, same, dtype, device)
            peers |= attempted(component, PEERS[mode], make, say, device)
        yield peers
    finally:
        peers.clear()
        free(device)


def _checked(
    component: ComponentName,
    folder: Path,
    checkpoint: Checkpoint,
    inputs: Arrays,
    mode: str,
    exact: Tensor,
    same: Tensor,
    dtype: torch.dtype,
    device: str,
) -> Peer:
    """Raises ParityError for another output than PyTorch's."""
    x = {key: torch.tensor(array, device=device) for key, array in inputs.items()}
    forward = MAKERS[component](folder, checkpoint, x, dtype, None if mode == "eager" else mode)
    call = _without_gradients(forward, compiled=mode != "eager")
    for _ in range(3):  # the third run of a compiled one is the first from its CUDA graph
        call()
    rms, wrong = peer_error(call().clone(), exact, same, fp32=dtype == torch.float32)
    if wrong:
        raise ParityError("; ".join(wrong))
    return Peer(Task(PEERS[mode], call, TorchEvents() if device == "cuda" else cpu_clock), rms)


def attempted(what: str, name: str, make: Callable[[], Peer], say: Callable[[str], object], device: str) -> dict[str, Peer]:
    """The peer by its name. None, and why is said, if it does not run, or not as exactly as PyTorch; what it is beside is timed all
    the same."""
    try:
        return {name: make()}
    except Exception as error:
        why = str(error) if isinstance(error, ParityError) else repr(error)
    say(f"{what}, {name}: {why}. It is not timed.")
    gc.collect()  # what it took; not free(), which would forget what was compiled for others
    if device == "cuda":
        torch.cuda.empty_cache()
    return {}


def _without_gradients(forward: Forward, *, compiled: bool) -> Forward:
    def call() -> Tensor:
        with torch.no_grad():
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
            return forward()

    return call


def check_layout(folder: Path) -> None:
    """Raises RequestError if peers cannot be made of it."""
    if not (folder / "model_index.json").is_file():
        raise RequestError(f"--model: got {folder}, which has no model_index.json; peers need diffusers' layout. --peers none")


def free(device: str) -> None:
    """Of peers that nothing refers to any more."""
    dynamo: Any = torch._dynamo
    dynamo.reset()  # compiled code keeps its module, and few shapes of one module may be compiled
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
