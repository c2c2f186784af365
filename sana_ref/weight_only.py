"""Weights in 4 or 8 bits under activations that stay as they are: what the text encoder and the text projection may have.

    real = number * scale        int8: -127 to 127; fp8: e4m3, to 448; a scale a row of (columns, depth)
                                 int4: -8 to 7; BLOCK numbers along the depth share a scale, or 64, 32 or 16 if it is no divisor
    weight = real, rounded to the component's type

Scales are of the component's type, bf16 or fp16: TensorRT multiplies 4-bit numbers inside of a product only then. A row's scale
makes its largest number the format's largest. A block's is the one of CLIPS, of that, with the least squared error: with 16 levels
what is cut off a few large numbers costs less than coarser steps cost all others (as OMSE, arXiv:1902.06822, section 3).
Rounding is to nearest, ties to even, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from engines.errors import CheckpointError, SpecError
from sana_ref.quantize_ops import FP8_MAX, INT8_MAX

__all__ = [
    "BLOCK",
    "HOST",
    "INT4_LEAST",
    "INT4_MAX",
    "WEIGHT_FORMATS",
    "PackedWeight",
    "TableFormat",
    "TextFormat",
    "TextPart",
    "WeightFormat",
    "block_of",
    "formats_of",
    "pack_int4",
    "pack_weight",
    "quantizable",
    "role_of",
    "unpack_int4",
]

WeightFormat = Literal["int4", "int8", "fp8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
HOST: Literal["host"] = "host"  # of a table of tokens: it stays 16-bit, and on the host, where its rows are looked up
TableFormat = Literal["int4", "int8", "fp8", "host"]
TextFormat = Literal["int4", "int8", "fp8", "w8a8", "host"]  # w8a8: int8, the text encoder's activations too, by a plan
TextPart = Literal["text_encoder", "text_encoder_table", "text_projection"]  # what has a format of its own: the keys of a recipe
INT4_LEAST, INT4_MAX = -8, 7
BLOCK = 128
_BLOCKS = (BLOCK, 64, 32, 16)  # TensorRT takes just these; scales of 128 are 3 % of the numbers
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}  # a scale of zeros, which stay zeros
_CONTAINERS = ("encoder", "layers", "transformer", "transformer_blocks")
_CHUNK = 1 << 20  # numbers that are worked on at once: they stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight (columns, depth) of the format `kind`.

    numbers: int8 or float8_e4m3fn (columns, depth); int4: uint8 (columns, depth / 2), the even one of two in the lower bits.
    scale: (columns,) of the component's type; int4: (columns, depth / block).
    """

    kind: WeightFormat
    numbers: Tensor
    scale: Tensor

    def real(self) -> Tensor:
        """(columns, depth) in the type of the scales: number * scale in fp32, rounded."""
        wide = self.scale.float()[..., None]
        if self.kind == "int4":
            blocks = unpack_int4(self.numbers).unflatten(1, (self.scale.shape[1], -1))
            return (blocks * wide).flatten(1).to(self.scale.dtype)
        return (self.numbers.float() * wide).to(self.scale.dtype)

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.numbers, self.scale))


def quantizable(module: nn.Module) -> list[str]:
    """Names of the weights (columns, depth) of linear layers and tables, in order. Norms are small, and stay."""
    kinds = (nn.Linear, nn.Embedding)
    found = [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, kinds)]
    there = dict(module.named_parameters())  # a component has some of its model's alone
    return [name for name in found if name in there]


def formats_of(module: nn.Module, kind: WeightFormat | None, table: TableFormat | None = None) -> dict[str, WeightFormat]:
    """Of each weight that `quantizable` has, in its order, but for tables on the host. table: of tables; None: as all else."""
    if kind is None:
        return {}
    tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    found = {name: table if table is not None and name in tables else kind for name in quantizable(module)}
    return {name: each for name, each in found.items() if each != HOST}


def role_of(parameter: str) -> str:
    """What a weight does, whichever block it is in: encoder.layers.3.mlp.up_proj.weight is mlp.up_proj."""
    words = parameter.removesuffix(".weight").split(".")
    return ".".join(word for word in words if not word.isdigit() and word not in _CONTAINERS)


def block_of(depth: int, name: str) -> int:
    """How many 4-bit numbers share a scale. Raises SpecError for a depth that none of the sizes divides."""
    for block in _BLOCKS:
        if depth % block == 0:
            return block
    raise SpecError(
        f"{name}: got int4 for a depth of {depth}; expected a multiple of {_BLOCKS[-1]}, which share a scale. Use int8 here."
    )


def pack_weight(weight: Tensor, kind: WeightFormat, name: str, dtype: torch.dtype) -> PackedWeight:
    """weight (columns, depth) of any floating type; it is rounded to `dtype`, the component's, before. `name` is for messages.

    A row of zeros stays zeros. Raises CheckpointError for a weight that is zeros altogether, or holds NaN or infinity, with the
    first such row; SpecError for int4 and a depth that is no multiple of 16.
    """
    columns, depth = weight.shape
    block = block_of(depth, name) if kind == "int4" else depth
    numbers, scales, largest = [], [], 0.0
    rows = max(1, _CHUNK // depth)
    for begin in range(0, columns, rows):
        wide = weight[begin : begin + rows].to(dtype).float()
        most = wide.abs().amax(-1)
        _check_finite(most, name, begin)
        largest = max(largest, float(most.amax()))
        made, scale = _int4(wide, block, dtype) if kind == "int4" else _rows(wide, most, kind, dtype)
        numbers.append(made)
        scales.append(scale)
    if largest == 0:
        raise CheckpointError(
            f"weight {name!r}: got zeros alone in all of {columns} rows; expected numbers, which a scale can be made of. "
            f"Mend the checkpoint, or leave this part out of the quantization."
        )
    return PackedWeight(kind=kind, numbers=torch.cat(numbers), scale=torch.cat(scales))


def _check_finite(most: Tensor, name: str, begin: int) -> None:
    bad = (~most.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise CheckpointError(
            f"weight {name!r}, row {begin + row}: got a range of {float(most[row]):g}; expected finite numbers. Mend it."
        )


def _rows(wide: Tensor, most: Tensor, kind: WeightFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    scale = (most / largest).clamp(min=_LEAST[dtype]).to(dtype)
    scaled = (wide / scale.float()[:, None]).clamp(-largest, largest)
    return scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn), scale


def _int4(wide: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    blocks = wide.unflatten(1, (-1, block))
    coarsest = blocks.abs().amax(-1) / INT4_MAX
    best_error, best_scale, best = None, None, None
    for clip in CLIPS:
        scale = (coarsest * clip).clamp(min=_LEAST[dtype]).to(dtype)
        factor = scale.float()[..., None]
        numbers = (blocks / factor).round_().clamp_(INT4_LEAST, INT4_MAX)
        error = (numbers * factor).sub_(blocks).square_().sum(-1)
        if best_error is None or best_scale is None or best is None:
            best_error, best_scale, best = error, scale, numbers
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best = torch.where(better[..., None], numbers, best)
    assert best is not None
    assert best_scale is not None
    return pack_int4(best.flatten(1).to(torch.int8)), best_scale


def pack_int4(numbers: Tensor) -> Tensor:
    """-8 to 7, int8 (C, D) -> two's complement in four bits, uint8 (C, D / 2); the first of two is in the lower bits."""
    bits = numbers.view(torch.uint8) & 15
    return bits[:, 0::2] | bits[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (C, D / 2) -> fp32 (C, D)."""
    bits = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(bits > INT4_MAX, bits - 16, bits).float()
