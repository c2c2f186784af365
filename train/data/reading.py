"""A finished cache, and batches from it. Tensors are mapped from their files: only what a batch holds is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.data.cache import FORMAT, Identity, read_json, shard_header
from train.data.captions import choose
from train.data.errors import DataError

__all__ = ["Cache", "Entry", "TrainingBatch"]


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

    def batch(self, samples: Sequence[int], *, length: int, passes: Sequence[int], seed: int, temperature: float) -> TrainingBatch:
        """Samples of one bucket. length: L, to which text is padded. passes: of each sample, which decides its caption."""
        from safetensors import safe_open

        latents, texts, chosen = [], [], []
        for sample, epoch in zip(samples, passes, strict=True):
            entry = self.entries[sample]
            caption = choose(entry.scores, temperature, seed=seed, epoch=epoch, key=entry.key)
            with safe_open(self.folder / entry.shard, framework="pt") as file:
                latents.append(file.get_tensor(f"{entry.number}.latent"))
                texts.append(file.get_tensor(f"{entry.number}.text.{caption}"))
            chosen.append(caption)
        sizes, longest = {tuple(latent.shape) for latent in latents}, max(map(len, texts), default=0)
        if len(sizes) != 1 or longest > length:
            raise DataError(
                f"batch: got {len(samples)} samples of {len(sizes)} sizes with up to {longest} tokens; expected one size and at "
                f"most {length} tokens."
            )
        text = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
        mask = torch.zeros(len(texts), length)
        for row, embedding in enumerate(texts):
            text[row, : len(embedding)] = embedding
            mask[row, : len(embedding)] = 1
        keys = tuple(self.entries[sample].key for sample in samples)
        return TrainingBatch(keys=keys, chosen=tuple(chosen), latents=torch.stack(latents), text=text, mask=mask)

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
        for number, sample in enumerate(shard_header(path)["samples"]):
            size, scores = (sample["width"], sample["height"]), tuple(sample["scores"])
            self.entries.append(Entry(sample["key"], name, number, *size, scores))


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
