"""Latents and text embeddings, computed once and kept in shards that training reads.

    OUT/1024px-0123456789abcdef/    the digest of the identity: the encoders, the data set, the sizes
        cache.json                  the identity, and how many shards there will be
        shard-00000.safetensors     see `pack_shard`
        report.json, index.json     broken samples; the shards: written when all are there

Another encoder makes another name, so that a stale cache is never continued, and reading refuses it. A shard is written under a
temporary name that its writer holds a lock on, then renamed: a kill leaves whole shards, and the next run makes the others.
A shard's content depends on its number and the identity alone, so any number of processes may write, on any number of machines
that share the folder. Each begins with its own share of the shards and then takes what nobody holds, so that one that dies or is
slow does not leave a hole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from train.data.buckets import Bucket, make_buckets, nearest
from train.data.captions import Caption
from train.data.errors import BrokenSample, DataError
from train.data.images import decode, fit
from train.data.report import Broken, Report
from train.data.settings import DataSettings
from train.data.source import Found, Item, read_captions, read_image

__all__ = ["FORMAT", "Encoders", "Identity", "Shards", "Writer", "pack_shard", "read_json", "shard_name"]

FORMAT = 1  # of the files; a reader refuses others
AREA_AT_ONCE = 8 * 1024 * 1024  # px that the autoencoder is given in a batch
TEXTS_AT_ONCE = 16


class Encoders(Protocol):
    """What turns pictures and captions into what training reads. The digests are of all that decides the results but the type."""

    vae_digest: str
    text_digest: str
    dtype: str  # that they compute and answer in

    def latents(self, pixels: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, C, H/32, W/32), as the transformer sees them, on the CPU."""

    def texts(self, captions: list[str]) -> list[Tensor]:
        """Of each caption (l, C): the embeddings of its l tokens, without padding, on the CPU.

        The first is <bos>, which is all that an empty prompt has and sees nothing that follows: it stands for the empty prompt.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """All that decides a cache's bytes."""

    vae: str  # digest
    text_encoder: str  # digest, tokenizer and instruction included
    dtype: str  # of computing and storing
    data: str  # digest
    resolution: int  # px
    max_pixels: int
    shard_size: int
    format: int = FORMAT

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        return f"{self.resolution}px-{self.digest[:16]}"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Raises DataError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a cache. Make it anew: sana data prepare.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: got a {type(value).__name__}; expected a JSON object. Make the cache anew: sana data prepare.")
    return value


class Shards(ABC):
    """Makes a cache below `out`, shard by shard. What makes a shard's samples says so in write_shard."""

    def __init__(self, identity: Identity, report: Report, num_samples: int, out: Path) -> None:
        self.identity, self.report, self.num_samples = identity, report, num_samples
        self.folder = out / identity.name
        self.num_shards = -(-num_samples // identity.shard_size)
        self._reported: set[int] = set()  # shards whose broken samples are in the report

    @abstractmethod
    def write_shard(self, index: int) -> bytes:
        """The bytes of shard `index`: see pack_shard."""

    def write(self, *, part: int = 0, parts: int = 1, on_shard: Callable[[int, int], None] | None = None) -> Path:
        """Make every shard that is not there and that no other process is making. Returns the cache's folder.

        part of parts: where to begin. on_shard: called with shards that are there and shards in all.
        Raises TooManyBroken; report.json says what was broken, and the shards that are finished stay.
        """
        try:
            self.report.check()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._begin()
            order = [index for first in range(parts) for index in range((part + first) % parts, self.num_shards, parts)]
            for done, index in enumerate(order):
                if on_shard is not None:
                    on_shard(done, self.num_shards)
                self._shard(index)
            if on_shard is not None:
                on_shard(self.num_shards, self.num_shards)
        except DataError:
            if self.folder.is_dir():
                self._put("report.json", self.report.to_json())
            raise
        self._finish()
        return self.folder

    def _begin(self) -> None:
        content = {"identity": asdict(self.identity), "num_shards": self.num_shards, "num_samples": self.num_samples}
        self._put("cache.json", _json(content))

    def _shard(self, index: int) -> None:
        path = self.folder / shard_name(index)
        if not path.exists():
            with _claimed(path) as stream:
                if stream is None:  # another process has it, or has just finished it
                    return
                stream.write(self.write_shard(index))
        self._note_broken(index)

    def _note_broken(self, index: int) -> None:
        if index not in self._reported:
            self._reported.add(index)
            for entry in shard_header(self.folder / shard_name(index))["broken"]:
                self.report.add(Broken(**entry))

    def _finish(self) -> None:
        """Write index.json and the report, if all shards are there."""
        paths = [self.folder / shard_name(index) for index in range(self.num_shards)]
        if not all(path.exists() for path in paths):
            return
        for index in range(self.num_shards):
            self._note_broken(index)
        shards = [
            {"file": path.name, "bytes": path.stat().st_size, "samples": len(shard_header(path)["samples"])} for path in paths
        ]
        self._put("report.json", self.report.to_json())
        self._put("index.json", _json({"identity": self.identity.digest, "shards": shards}))

    def _put(self, name: str, content: bytes) -> None:
        path = self.folder / name
        if path.exists() and path.read_bytes() == content:
            return
        with _claimed(path, wait=True) as stream:
            assert stream is not None
            stream.write(content)


class Writer(Shards):
    """Makes the cache of `found`. Raises TooManyBroken if its names alone show that too much is broken."""

    def __init__(self, found: Found, encoders: Encoders, settings: DataSettings, out: Path) -> None:
        identity = Identity(
            vae=encoders.vae_digest,
            text_encoder=encoders.text_digest,
            dtype=encoders.dtype,
            data=found.digest,
            resolution=settings.resolution,
            max_pixels=settings.max_pixels,
            shard_size=settings.shard_size,
        )
        report = Report(total=found.total, max_share=settings.max_broken_share, broken=found.broken)
        super().__init__(identity, report, len(found.items), out)
        self.found, self.encoders, self.settings = found, encoders, settings
        self.buckets = make_buckets(settings.resolution)
        self.batch_size = max(1, AREA_AT_ONCE // settings.resolution**2)

    def write_shard(self, index: int) -> bytes:
        """The bytes of shard `index`: see pack_shard."""
        begin = index * self.settings.shard_size
        samples: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        broken: list[Broken] = []
        for bucket, batch in self._batches(self.found.items[begin : begin + self.settings.shard_size], broken):
            latents = self.encoders.latents(np.stack([pixels for _, pixels, _ in batch]))
            texts = self._texts([caption.text for _, _, captions in batch for caption in captions])
            for latent, (item, _, captions) in zip(latents, batch, strict=True):
                number = len(samples)
                tensors[f"{number}.latent"] = _own(latent)
                for k in range(len(captions)):
                    tensors[f"{number}.text.{k}"] = _own(next(texts))
                samples.append(
                    {
                        "key": item.key,
                        "width": bucket.width,
                        "height": bucket.height,
                        "captions": [caption.text for caption in captions],
                        "scores": [caption.score for caption in captions],
                    }
                )
        return pack_shard(tensors, samples, broken)

    def _batches(
        self, items: tuple[Item, ...], broken: list[Broken]
    ) -> Iterator[tuple[Bucket, list[tuple[Item, np.ndarray, tuple[Caption, ...]]]]]:
        """Samples of one bucket at a time, decoded. Which ones share a batch depends on the shard alone."""
        waiting: dict[int, list[tuple[Item, np.ndarray, tuple[Caption, ...]]]] = {}
        for item in items:
            try:
                captions = read_captions(self.found.root, item)
                image = decode(read_image(self.found.root, item), self.settings.max_pixels)
            except BrokenSample as error:
                broken.append(Broken(item.key, str(error)))
                if len(self.report.broken) + len(broken) > self.report.max_share * self.report.total:
                    self.report.broken += broken
                    self.report.check()  # raises, before the rest of the shard is encoded for nothing
                continue
            number = nearest(self.buckets, *image.size)
            batch = waiting.setdefault(number, [])
            batch.append((item, np.asarray(fit(image, self.buckets[number])), captions))
            if len(batch) == self.batch_size:
                yield self.buckets[number], waiting.pop(number)
        for number, batch in sorted(waiting.items()):
            yield self.buckets[number], batch

    def _texts(self, captions: list[str]) -> Iterator[Tensor]:
        for begin in range(0, len(captions), TEXTS_AT_ONCE):
            yield from self.encoders.texts(captions[begin : begin + TEXTS_AT_ONCE])


def pack_shard(tensors: dict[str, Tensor], samples: list[dict[str, Any]], broken: Sequence[Broken] = ()) -> bytes:
    """A safetensors file.

    Tensors of its sample n: "n.latent" (C, h, w), and "n.text.k" (l, C) for its caption k. One string of metadata, "shard", is
    JSON: "samples", each with key, width, height (of the bucket, px), captions and scores; and "broken", with name and reason.
    """
    from safetensors.torch import save

    header = {"samples": samples, "broken": [asdict(entry) for entry in broken]}
    # One key alone: safetensors writes several in an order that changes from run to run.
    return save(tensors, metadata={"shard": json.dumps(header)})


def shard_header(path: Path) -> dict[str, Any]:
    """Raises DataError if it is not a whole shard."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["shard"]))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a shard of a cache ({error}). Delete this file and run sana data prepare again.") from None


def _own(tensor: Tensor) -> Tensor:
    """A copy without gaps: safetensors refuses views and memory that is shared."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def _claimed(path: Path, *, wait: bool = False) -> Iterator[Any]:
    """A stream whose content is at `path`, whole, when the block ends; nothing changes if it raises or the process is killed.

    Gives None if another process is writing `path`, or has written it since the caller looked; with `wait`, waits for it instead.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # of a fixed name: what a killed writer leaves, the next one overwrites
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with open(descriptor, "r+b") as stream:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            try:
                mine = os.path.samestat(os.fstat(descriptor), os.lstat(temporary))
            except FileNotFoundError:
                mine = False
            if not mine:  # its writer has renamed it while this waited for the lock
                if wait:
                    continue
                yield None
                return
            if not wait and path.exists():
                temporary.unlink()
                yield None
                return
            try:
                stream.truncate(0)
                yield stream
                stream.flush()
                os.fsync(descriptor)
                os.rename(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _fsync_folder(path.parent)
            return


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
