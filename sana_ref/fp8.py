"""FP8 with a scale a row: numbers are e4m3, and a row's largest number becomes 448, the largest of e4m3.

So cuBLASLt's layers have it (export/fp8_nodes.py), weights as activations. Layers in PyTorch: sana_ref/quantized.py.
"""

import torch
from torch import Tensor

__all__ = ["LARGEST", "LEAST_SCALE", "quantize_rows"]

LARGEST = 448.0  # of e4m3
LEAST_SCALE = 2.0**-126  # as plugins/fp8_quantize.py has it


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, D) as bits (…, D) float8_e4m3fn and scale (…) fp32: x is about bits * scale."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE)
    return (wide * (1.0 / scale)[..., None]).to(torch.float8_e4m3fn), scale
