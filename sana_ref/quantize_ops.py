"""What INT8, FP8 and NVFP4 numbers mean: quantise and dequantise, in PyTorch, as the operators of the exported graphs do.

    real = number * scale                      int8: -127 to 127 (activations with one scale: -128 too, as ONNX has it)
                                               fp8:  e4m3, largest 448, nothing infinite
    real = number * (block_scale * scale)      nvfp4: e2m1 {0, 0.5, 1, 1.5, 2, 3, 4, 6} with a sign; 16 along the depth share an
                                               e4m3 block_scale, and a tensor an fp32 scale

All rounding is to nearest, ties to even, and what is too large becomes the largest number. Everything is computed in fp32.
Sources: ONNX QuantizeLinear and DequantizeLinear, opset 23; TensorRT's IDynamicQuantizeLayer for activations in NVFP4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engines.errors import CheckpointError
from sana_ref.fp8 import LARGEST as FP8_MAX
from sana_ref.fp8 import LEAST_SCALE, quantize_rows

__all__ = [
    "BLOCK",
    "E2M1",
    "FP4_MAX",
    "FP8_MAX",
    "INT8_MAX",
    "NVFP4_RANGE",
    "QuantizedWeight",
    "Rows",
    "finite_range",
    "quantize_weight",
    "round_dynamic",
    "round_nvfp4",
    "round_static",
    "unpack_e2m1",
]

INT8_MAX, FP4_MAX, BLOCK = 127, 6.0, 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a number; the fourth is the sign
NVFP4_RANGE = FP4_MAX * FP8_MAX  # a tensor's largest number over its fp32 scale: then the largest block's scale is 448
Rows = Literal["int8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight (columns, depth) in 8 or 4 bits.

    numbers: int8 or float8_e4m3fn (columns, depth); nvfp4: uint8 (columns, depth / 2), the even one of two in the lower bits.
    scale: fp32, (columns,); nvfp4: ().  block_scale: nvfp4 alone: float8_e4m3fn (columns, depth / 16).
    """

    numbers: Tensor
    scale: Tensor
    block_scale: Tensor | None = None

    def real(self) -> Tensor:
        """(columns, depth) fp32, as DequantizeLinear has it."""
        if self.block_scale is None:
            return self.numbers.float() * self.scale[:, None]
        blocks = unpack_e2m1(self.numbers).unflatten(1, (-1, BLOCK))
        return (blocks * (self.block_scale.float() * self.scale)[..., None]).flatten(1)


def finite_range(x: Tensor, name: str) -> float:
    """The largest absolute value. Raises CheckpointError, with the name, where it is zero, infinite or NaN: no scale follows."""
    largest = float(x.abs().amax()) if x.numel() else 0.0
    if not math.isfinite(largest) or largest == 0:
        raise CheckpointError(
            f"{name}: got a range of {largest:g}; expected a finite number above 0, which a scale can be made of. "
            "Leave this layer out of the quantization, or mend the checkpoint."
        )
    return largest


def quantize_weight(
    weight: Tensor, kind: Literal["int8", "fp8", "nvfp4"], name: str, scale: Tensor | None = None
) -> QuantizedWeight:
    """weight (columns, depth) of any floating type. scale (columns,) fp32: int8 and fp8 only; else a row's largest is the largest.

    Raises CheckpointError for a weight that is all zeros, or holds NaN or infinity; ValueError for nvfp4 with a depth that is no
    multiple of 16. `name` is for messages.
    """
    wide = weight.float()
    finite_range(wide, name)
    if kind == "nvfp4":
        return _quantize_nvfp4(wide, name)
    if scale is None and kind == "fp8":
        numbers, scale = quantize_rows(wide)
        return QuantizedWeight(numbers=numbers, scale=scale)
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    if scale is None:
        scale = (wide.abs().amax(-1) / largest).clamp(min=LEAST_SCALE)
    scale = scale.to(wide)
    scaled = (wide * (1.0 / scale)[:, None]).clamp(-largest, largest)
    return QuantizedWeight(numbers=scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn), scale=scale)


def round_static(x: Tensor, kind: Rows, scale: float) -> Tensor:
    """x fp32, quantised with one scale and dequantised: QuantizeLinear and DequantizeLinear."""
    factor = torch.tensor(scale, dtype=torch.float32, device=x.device)
    scaled = x / factor
    if kind == "int8":
        return scaled.round().clamp(-INT8_MAX - 1, INT8_MAX) * factor
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * factor


def round_dynamic(x: Tensor, kind: Rows) -> Tensor:
    """x (…, D) fp32, quantised with a scale a row, so that its largest number is 127 or 448, and dequantised."""
    if kind == "fp8":
        numbers, scale = quantize_rows(x)
        return numbers.float() * scale[..., None]
    scale = (x.abs().amax(-1, keepdim=True) / INT8_MAX).clamp(min=LEAST_SCALE)
    return (x * (1.0 / scale)).round().clamp(-INT8_MAX, INT8_MAX) * scale


def round_nvfp4(x: Tensor, scale: float) -> Tensor:
    """x (…, D) fp32 as NVFP4 has it, D a multiple of 16. scale: of the block scales, largest number / NVFP4_RANGE."""
    factor = torch.tensor(scale, dtype=torch.float32, device=x.device)
    blocks = x.unflatten(-1, (-1, BLOCK))
    numbers, block_scale = _blocks(blocks, factor)
    return (numbers * (block_scale.float() * factor)).flatten(-2)


def _quantize_nvfp4(wide: Tensor, name: str) -> QuantizedWeight:
    if wide.shape[-1] % BLOCK:
        raise ValueError(f"{name}: got a depth of {wide.shape[-1]}; expected a multiple of {BLOCK}, which share a scale in NVFP4")
    scale = (wide.abs().amax() / NVFP4_RANGE).clamp(min=LEAST_SCALE)
    numbers, block_scale = _blocks(wide.unflatten(-1, (-1, BLOCK)), scale)
    return QuantizedWeight(numbers=_pack_e2m1(numbers.flatten(1)), scale=scale, block_scale=block_scale[..., 0])


def _blocks(blocks: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(…, 16) -> numbers of e2m1, fp32 (…, 16), and block scales, e4m3 (…, 1)."""
    block_scale = (blocks.abs().amax(-1, keepdim=True) / FP4_MAX / scale).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    # a block whose scale is rounded to 0 is 0 whatever its numbers: they need only be finite
    scaled = (blocks / (block_scale.float() * scale).clamp(min=LEAST_SCALE)).clamp(-FP4_MAX, FP4_MAX)
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # between neighbours; a tie goes to the even multiple of it
    return (scaled / step).round() * step, block_scale


def _pack_e2m1(numbers: Tensor) -> Tensor:
    """Numbers of e2m1 (C, D) as bits (C, D / 2) uint8; the first of two is in the lower bits."""
    size = numbers.abs()
    bits = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4)).to(torch.uint8)
    bits = bits | (numbers < 0).to(torch.uint8) << 3
    return bits[:, 0::2] | bits[:, 1::2] << 4


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Bits (C, D / 2) uint8 as fp32 (C, D)."""
    table = torch.tensor([*E2M1, *(-number for number in E2M1)], device=packed.device)
    return table[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()]
