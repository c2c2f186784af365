"""bfloat16 for NumPy, which has no such type: the bits in a uint16, the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_bfloat16", "to_bfloat16"]


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even. Any shape; no NaN."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact. Any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
