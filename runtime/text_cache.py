"""Texts that were encoded lately. The empty negative prompt comes with almost every request, and encoding costs seconds on a CPU.

Each text is encoded alone, never in a batch: its embedding then depends on nothing but itself, and a hit gives the same bits as a
miss. What the text projection makes of it is not kept: 54 MB a text of Sana-1.6B in 16 bits, for a twentieth of the work of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.session import Job, Text

__all__ = ["TextCache"]

Encode = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]  # ids, mask (1, S) -> (1, L, C)


class TextCache:
    def __init__(self, encode: Encode, *, size: int = 16) -> None:
        """size: how many embeddings are kept; one of Gemma-2-2B is 2.8 MB."""
        self._encode, self._size = encode, size
        self._kept: OrderedDict[tuple[bytes, bytes], NDArray[np.float32]] = OrderedDict()

    def embed(self, text: Text) -> NDArray[np.float32]:
        """(L, C)"""
        key = (text.ids.tobytes(), text.mask.tobytes())
        if key not in self._kept:
            self._kept[key] = self._encode(text.ids[None], text.mask[None])[0]
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def embed_job(self, job: Job) -> NDArray[np.float32]:
        """(k, B, L, C)"""
        return np.stack([np.stack([self.embed(text) for text in row]) for row in job.texts])
