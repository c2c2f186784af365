"""The original .pth files: the transformer alone, under other names, with q, k and v in one matrix.

`torch.load(weights_only=True)` reads tensors and plain containers; a file that asks for more is refused.
Source of the names: NVlabs/Sana's modules, and diffusers' for ours.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engines.errors import CheckpointError
from sana_ref.tensors import Part

__all__ = ["PthSource", "plan_conversion"]

DROPPED = re.compile(r"(y_embedder\.y_embedding|pos_embed|logvar_linear\..*)")  # null text, recomputed positions, a training head

# Original stem to our stem, outside the blocks; "{time}" is "time_embed." with ".emb" where guidance is not embedded.
OUTER = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "t_embedder.mlp.0": "{time}timestep_embedder.linear_1",
    "t_embedder.mlp.2": "{time}timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "{time}guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "{time}guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
}
# Inside block N: original stem to our stems, which share its rows equally.
BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.q_norm": ("attn2.norm_q",),
    "cross_attn.k_norm": ("attn2.norm_k",),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
TABLE = "scale_shift_table"  # a parameter itself, not a stem with .weight and .bias


class PthSource:
    """The tensors of an original .pth under their original names."""

    def __init__(self, file: Path) -> None:
        self.files = (file,)
        self._tensors = _read(file)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def plan_conversion(names: Iterable[str]) -> dict[str, Part]:
    """Our name of every tensor to the part of the original tensor that it is. Names that the table lacks stay as they are."""
    names = list(names)
    time = "time_embed." if any(name.startswith("cfg_embedder.") for name in names) else "time_embed.emb."
    plan: dict[str, Part] = {}
    for name in names:
        if DROPPED.fullmatch(name):
            continue
        targets = _our_names(name, time)
        for index, target in enumerate(targets):
            plan[target] = Part(name, index, len(targets))
    return plan


def _our_names(name: str, time: str) -> list[str]:
    if name == f"final_layer.{TABLE}":
        return [TABLE]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block and block[2] == TABLE:
        return [f"transformer_blocks.{block[1]}.{TABLE}"]
    stem, _, kind = (block[2] if block else name).rpartition(".")
    if block:
        return [f"transformer_blocks.{block[1]}.{ours}.{kind}" for ours in BLOCK.get(stem, ())] or [name]
    return [f"{OUTER[stem].format(time=time)}.{kind}"] if stem in OUTER else [name]


def _read(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        zip_begins = stream.read(2) == b"PK"
    zipped = zipfile.is_zipfile(file)
    if zip_begins and not zipped:
        raise CheckpointError(f"{file}: got a .pth without its end. The download broke off: download it again.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: needs more than tensors to be read ({_first_line(error)}); expected a file that "
            "torch.load(weights_only=True) takes, because others can run code. Use the diffusers-format repository of the model."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a readable .pth ({_first_line(error)}). Download it again.") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        found = sorted(map(str, content))[:10] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: got {found}; expected 'state_dict', tensors by name. Is this a Sana checkpoint?")
    return {str(name): tensor for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
