"""What a quantized model is: for each group of linear layers its format, its scales, and what corrects it. Data alone.

A calibration (export/) makes a plan; a simulation in PyTorch and the exported graphs read it: the same numbers everywhere.

A group is what one product computes, so layers that share an input and are multiplied together: of each block of the transformer

    attn1.to_qkv  attn1.to_out.0  attn2.to_q  attn2.to_out.0  ff.conv_inverted  ff.conv_point

and of each layer of the text encoder, whose products of one input are apart but have one scale and one smoothing

    self_attn.to_qkv  self_attn.o_proj  mlp.to_gate_up  mlp.down_proj

The layer of a group with weight W (columns, depth), for tokens x (…, depth), is

    y = Q_x(x / s) @ Q_w(W * s - U @ V)^T + (x / s) @ V^T @ U^T + bias

with s the optional `smooth` (SmoothQuant, arXiv 2211.10438, equation 3, and AWQ, arXiv 2306.00978, section 3.2) and U, V the
optional `low_rank_up`, `low_rank_down` in the layer's own precision (SVDQuant, arXiv 2411.05007, section 4.2).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.errors import SpecError

__all__ = [
    "FORMATS",
    "TENSORS",
    "Format",
    "LayerPlan",
    "QuantizationPlan",
    "group_of",
    "groups_of",
    "is_of_text",
    "load_plan",
    "part_of",
    "plan_digest",
    "prefix_of",
    "save_plan",
]

Format = Literal["none", "int8", "fp8", "nvfp4"]  # none: as the rest of the component
FORMATS: tuple[Format, ...] = ("none", "int8", "fp8", "nvfp4")
# "<group>.<suffix>" in QuantizationPlan.tensors, all fp32 and optional:
#   smooth (depth,)              activations are divided by it and weights multiplied
#   low_rank_down (rank, depth)  V above
#   low_rank_up (columns, rank)  U above
#   weight_scale (columns,)      int8 and fp8: real = number * scale, a row; without, the row's largest number is 127, or 448
TENSORS = ("smooth", "low_rank_down", "low_rank_up", "weight_scale")
# A block's layer: its group. Layers of one group are joined in this order.
_LAYERS = {
    **dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn1.to_qkv"),
    **{name: name for name in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point")},
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.to_qkv"),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "mlp.to_gate_up"),
    **{name: name for name in ("self_attn.o_proj", "mlp.down_proj")},
}
_ORDER = {name: place for place, name in enumerate(_LAYERS)}
_PARAMETER = re.compile(r"((?:transformer_blocks|layers)\.\d+\.)(.+)\.weight$")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LayerPlan(BaseModel):
    """Of one group.

    input_scale: of activations, one number for all (real = number * scale; int8 and fp8); None: found while it runs, a scale a
    token. nvfp4 has block scales that are found while it runs, and input_scale as the scale of those (fp32).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Format
    input_scale: Positive | None = None


class QuantizationPlan(BaseModel):
    """layers: by group; a group that is not named stays as it is. tensors: see TENSORS."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    layers: dict[str, LayerPlan]
    tensors: dict[str, Tensor] = Field(default_factory=dict)
    notes: dict[str, str] = Field(default_factory=dict)  # how it was made: method, prompts, seeds, digests

    def tensor(self, group: str, suffix: str) -> Tensor | None:
        return self.tensors.get(f"{group}.{suffix}")


def group_of(parameter: str) -> str | None:
    """The group that a parameter's name, such as transformer_blocks.3.attn1.to_k.weight, belongs to; None for all others."""
    found = _PARAMETER.search(parameter)
    group = None if found is None else _LAYERS.get(found[2])
    return None if found is None or group is None else found[1] + group


def prefix_of(parameter: str) -> str:
    """What stands before its group in a parameter's name: transformer., encoder. or nothing."""
    found = _PARAMETER.search(parameter)
    return parameter[: 0 if found is None else found.start()]


def groups_of(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Group: the names of its weights, in the order in which they are joined."""
    found: dict[str, list[str]] = {}
    for name in parameters:
        group = group_of(name)
        if group is not None:
            found.setdefault(group, []).append(name)
    for names in found.values():
        names.sort(key=_place)
    return found


def _place(parameter: str) -> int:
    found = _PARAMETER.search(parameter)
    return -1 if found is None else _ORDER[found[2]]


def is_of_text(group: str) -> bool:
    """Whether the group is the text encoder's; all others are the denoiser's."""
    return group.startswith("layers.")


def part_of(plan: QuantizationPlan, *, text: bool) -> QuantizationPlan:
    """What a plan says of the text encoder, or of the denoiser."""
    layers = {group: layer for group, layer in plan.layers.items() if is_of_text(group) == text}
    tensors = {name: tensor for name, tensor in plan.tensors.items() if name.rpartition(".")[0] in layers}
    return plan.model_copy(update={"layers": layers, "tensors": tensors})


def save_plan(plan: QuantizationPlan, path: Path) -> None:
    """One safetensors file; the layers are in its metadata, as JSON."""
    text = plan.model_dump_json(exclude={"tensors"})
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in sorted(plan.tensors.items())}
    save_file(tensors or {"empty": torch.zeros(1)}, path, metadata={"plan": text})


def plan_digest(plan: QuantizationPlan) -> str:
    """sha256 of what decides the numbers of a model: layers and tensors, not the notes."""
    digest = hashlib.sha256(plan.model_dump_json(include={"layers"}).encode())
    for name, tensor in sorted(plan.tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_plan(path: Path) -> QuantizationPlan:
    """Raises SpecError for a file that is none, or whose tensors do not belong to its layers."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("plan")
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != "empty"}
        if text is None:
            raise SpecError(f"{path}: got no plan in the file's metadata; expected what a calibration wrote. Calibrate again.")
        plan = QuantizationPlan.model_validate_json(text)
    except (OSError, SafetensorError, ValidationError) as error:
        raise SpecError(f"{path}: got no plan of a quantization: {error}. Calibrate again.") from None
    for name in tensors:
        group, _, suffix = name.rpartition(".")
        if suffix not in TENSORS or group not in plan.layers:
            raise SpecError(f"{path}: got a tensor {name!r}; expected <group>.{{{', '.join(TENSORS)}}} of a group in the plan.")
    return plan.model_copy(update={"tensors": tensors})
