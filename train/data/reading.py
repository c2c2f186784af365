"""A finished cache, and batches from it.

Where each tensor lies is noted when the cache is opened. A batch then is one positioned read a tensor, straight into its place:
no header is parsed again, threads share the files, and a file that was cut is an error. (safetensors' own reader parses the header
at each opening: 10 ms for a shard of 4096 samples. Mapped files would end the process if one is cut.)
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.cache import FORMAT, Identity, read_json, shard_header
from train.data.captions import choose
from train.data.errors import DataError

__all__ = ["Cache", "Entry", "TrainingBatch"]

MAX_OPEN = 256  # files; a process may usually have 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample of a cache. scores: one for each caption, whose words stay on the disk: there may be millions."""

    key: str
    shard: str
    number: int  # within the shard
    width: int  # px, of its bucket
    height: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """latents: (B, C, h, w), as the transformer sees them. text: (B, L, C), zero where mask (B, L) fp32 is 0."""

    keys: tuple[str, ...]
    chosen: tuple[int, ...]  # which caption of each
    latents: Tensor
    text: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where a shard's tensors lie: of sample n its latent, and the texts of its captions from number first[n] on."""

    latent_dtype: torch.dtype
    text_dtype: torch.dtype
    channels: int  # of texts
    shapes: list[tuple[int, ...]]  # of latents
    latent_at: np.ndarray  # (n,) int64, bytes from the file's beginning
    text_at: np.ndarray  # (captions,) int64
    tokens: np.ndarray  # (captions,) int64
    first: np.ndarray  # (n + 1,) int64


class _Open:
    """A file that is open for as long as someone has it: a thread may still read what another one's openings pushed out."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror}); expected the shard that was there at first.") from None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, into: np.ndarray, at: int) -> None:
        """Fill `into`, uint8 without gaps, from byte `at` on. Raises DataError."""
        done, num_bytes = 0, into.nbytes
        while done < num_bytes:  # a network's file system may give less at once
            try:
                num = os.preadv(self._descriptor, [into.data[done:]], at + done)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror}). Look at its disk, then go on.") from None
            if num == 0:
                raise DataError(
                    f"{self.path}: got {done} of {num_bytes} bytes at {at}; expected a whole shard. It was cut since the cache was "
                    "opened. Delete it and index.json; run sana data prepare again."
                )
            done += num


class Cache:
    """folder: what `sana data prepare` named.

    expected: fields of Identity and the values that the run has, such as vae=checkpoint's digest. Raises DataError if another
    encoder made this cache, if it is not finished, or if it is damaged.
    """

    def __init__(self, folder: Path, expected: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.identity = _identity(folder, expected or {})
        if not (folder / "index.json").is_file():
            there, num = len(list(folder.glob("shard-*.safetensors"))), read_json(folder / "cache.json").get("num_shards")
            raise DataError(f"{folder}: the cache is not finished: got {there} of {num} shards. Run sana data prepare again.")
        index = read_json(folder / "index.json")
        self.entries: list[Entry] = []
        self._layouts: dict[str, _Layout] = {}
        self._open = functools.lru_cache(MAX_OPEN)(_Open)
        try:
            if index["identity"] != self.identity.digest:
                raise DataError(f"{folder}: index.json belongs to another cache. Delete the folder; run sana data prepare again.")
            for shard in index["shards"]:
                self._add(shard["file"], shard["bytes"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder}: damaged ({error!r}). Delete it and run sana data prepare again.") from None
        sizes = sorted({(entry.width, entry.height) for entry in self.entries})
        self.buckets = [sizes.index((entry.width, entry.height)) for entry in self.entries]  # of each entry, as Order takes them

    def __len__(self) -> int:
        return len(self.entries)

    def batch(
        self, samples: Sequence[int], *, length: int, passes: Sequence[int], seed: int, temperature: float, pin: bool = False
    ) -> TrainingBatch:
        """Samples of one bucket. length: L, to which text is padded. passes: of each sample, which decides its caption.

        pin: into memory from which a GPU can fetch without waiting. May be called from several threads. Raises DataError.
        """
        entries = [self.entries[sample] for sample in samples]
        layouts = [self._layouts[entry.shard] for entry in entries]
        chosen = [
            choose(entry.scores, temperature, seed=seed, epoch=epoch, key=entry.key)
            for entry, epoch in zip(entries, passes, strict=True)
        ]
        texts = [int(layout.first[entry.number]) + k for layout, entry, k in zip(layouts, entries, chosen, strict=True)]
        tokens = [int(layout.tokens[text]) for layout, text in zip(layouts, texts, strict=True)]
        sizes = {layout.shapes[entry.number] for layout, entry in zip(layouts, entries, strict=True)}
        longest = max(tokens, default=0)
        if len(sizes) != 1 or longest > length:
            raise DataError(
                f"batch: got {len(samples)} samples of {len(sizes)} sizes with up to {longest} tokens; expected one size and at "
                f"most {length} tokens."
            )
        kinds = {(layout.latent_dtype, layout.text_dtype, layout.channels) for layout in layouts}
        if len(kinds) != 1:
            raise DataError(
                f"batch: got tensors of {len(kinds)} kinds, {kinds}; expected one. Run sana data prepare in a new folder."
            )
        latent_dtype, text_dtype, channels = kinds.pop()
        latents = torch.empty((len(samples), *sizes.pop()), dtype=latent_dtype, pin_memory=pin)
        text = torch.zeros((len(samples), length, channels), dtype=text_dtype, pin_memory=pin)
        mask = torch.zeros((len(samples), length), pin_memory=pin)
        latent_bytes, text_bytes, shown = _bytes(latents), _bytes(text), mask.numpy()
        width = channels * text.element_size()
        for row, (entry, layout, place, num) in enumerate(zip(entries, layouts, texts, tokens, strict=True)):
            file = self._open(self.folder / entry.shard)
            file.read(latent_bytes[row], int(layout.latent_at[entry.number]))
            file.read(text_bytes[row, : num * width], int(layout.text_at[place]))
            shown[row, :num] = 1
        keys = tuple(entry.key for entry in entries)
        return TrainingBatch(keys=keys, chosen=tuple(chosen), latents=latents, text=text, mask=mask)

    def captions(self, sample: int) -> tuple[str, ...]:
        """The words of a sample's captions, read from its shard."""
        entry = self.entries[sample]
        return tuple(shard_header(self.folder / entry.shard)["samples"][entry.number]["captions"])

    def _add(self, name: str, num_bytes: int) -> None:
        path = self.folder / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != num_bytes:
            got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise DataError(
                f"{path}: got {got}; expected {num_bytes} bytes. Delete it and index.json; run sana data prepare again."
            )
        samples = shard_header(path)["samples"]
        self._layouts[name] = _layout(path, [len(sample["scores"]) for sample in samples])
        for number, sample in enumerate(samples):
            size, scores = (sample["width"], sample["height"]), tuple(sample["scores"])
            self.entries.append(Entry(sample["key"], name, number, *size, scores))


def _layout(path: Path, num_captions: Sequence[int]) -> _Layout:
    """num_captions: of each sample. `path` was found to be a whole safetensors file. Raises DataError, KeyError."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        tensors: dict[str, Any] = json.loads(file.read(size))
    begin = 8 + size
    latents = [tensors[f"{n}.latent"] for n in range(len(num_captions))]
    texts = [tensors[f"{n}.text.{k}"] for n, num in enumerate(num_captions) for k in range(num)]
    kinds = {tensor["dtype"] for tensor in latents}, {(tensor["dtype"], *tensor["shape"][1:]) for tensor in texts}
    if not latents:  # all of its samples were broken
        kinds = {"F32"}, {("F32", 0)}
    if [len(kind) for kind in kinds] != [1, 1] or len(min(kinds[1])) != 2:
        raise DataError(f"{path}: got latents of types {kinds[0]}, texts of {kinds[1]}; expected one type of each. Make it anew.")
    latent_dtype, (text_dtype, channels) = kinds[0].pop(), kinds[1].pop()
    if not {latent_dtype, text_dtype} <= set(DTYPES):
        raise DataError(f"{path}: got types {latent_dtype}, {text_dtype}; expected among {', '.join(DTYPES)}. Make it anew.")
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # one tuple a shape, not one a sample
    shapes = [known.setdefault(shape, shape) for shape in (tuple(tensor["shape"]) for tensor in latents)]
    return _Layout(
        latent_dtype=DTYPES[latent_dtype],
        text_dtype=DTYPES[text_dtype],
        channels=channels,
        shapes=shapes,
        latent_at=np.array([begin + tensor["data_offsets"][0] for tensor in latents], np.int64),
        text_at=np.array([begin + tensor["data_offsets"][0] for tensor in texts], np.int64),
        tokens=np.array([tensor["shape"][0] for tensor in texts], np.int64),
        first=np.array([0, *accumulate(num_captions)], np.int64),
    )


def _bytes(tensor: Tensor) -> np.ndarray:
    """Its memory, a row a sample."""
    return tensor.flatten(1).view(torch.uint8).numpy()


def _identity(folder: Path, expected: Mapping[str, Any]) -> Identity:
    stored = read_json(folder / "cache.json").get("identity")
    if isinstance(stored, dict) and stored.get("format") != FORMAT:
        raise DataError(f"{folder}: got a cache of format {stored.get('format')}; expected {FORMAT}. Run sana data prepare again.")
    try:
        identity = Identity(**stored)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(f"{folder / 'cache.json'}: {error}. Delete the folder and run sana data prepare again.") from None
    wrong = {name: value for name, value in expected.items() if asdict(identity)[name] != value}
    if wrong:
        got = ", ".join(f"{name} {asdict(identity)[name]!s:.16}" for name in wrong)
        wanted = ", ".join(f"{name} {value!s:.16}" for name, value in wrong.items())
        raise DataError(
            f"{folder}: this cache was made by something else: got {got}; expected {wanted}. "
            "Run sana data prepare with this run's checkpoint, data and resolution, and use the folder that it names."
        )
    return identity
