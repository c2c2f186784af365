"""Micro-batches {"pictures": (B, 3, H, W) fp32, -1 to 1} without end, of files or of composed scenes.

Every batch is a function of the seed and of its number among those of all processes, which take them in turn; so the position is a
number, and a run on another number of processes sees the same pictures.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.autoencoder.settings import FileSettings, SceneSettings
from train.data.errors import BrokenSample, DataError
from train.data.images import SUFFIXES, decode
from train.data.report import Broken, Report
from train.data.settings import DataSettings
from train.data.source import Item, Part, find, read_image
from train.parallel.processes import Processes
from train.tiny.scenes import SceneTensors, compose, draw_scenes, palette
from train.tiny.sprites import load_sprites

__all__ = ["FileSource", "SceneSource", "make_source"]

_Crop: TypeAlias = tuple[np.ndarray | None, list[Broken]]  # (side, side, 3) uint8, and the broken samples before it

AHEAD = 2  # batches that are read while one is used
MAX_TRIES = 100  # samples in the place of a broken one


def make_source(
    settings: FileSettings | SceneSettings,
    *,
    micro_batch: int,
    processes: Processes,
    num_workers: int = 0,
    log: Callable[[str], None] | None = None,
) -> FileSource | SceneSource:
    """Raises DataError if there is nothing to read. log: is told of each broken sample."""
    if isinstance(settings, SceneSettings):
        return SceneSource(settings, micro_batch=micro_batch, processes=processes)
    return FileSource(settings, micro_batch=micro_batch, processes=processes, num_workers=num_workers, log=log)


def _random(*what: object) -> np.random.Generator:
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))


class _Numbered:
    """The position is the number of batches so far, of all processes together; `number` is that of this one's next batch."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.number = processes.rank

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.number - self.processes.rank}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number = int(state["batches"]) + self.processes.rank

    def advance(self) -> None:
        self.number += self.processes.world_size


class SceneSource(_Numbered):
    """Scenes from a table for each size, which is drawn once on the CPU; a batch has one size."""

    def __init__(self, settings: SceneSettings, *, micro_batch: int, processes: Processes) -> None:
        super().__init__(processes)
        self.settings, self.micro_batch = settings, micro_batch
        try:
            self.sprites = load_sprites(settings.path, processes.device).rgba
        except FileNotFoundError as error:
            raise DataError(f"pictures.path: {error}") from None
        self.colours = palette(processes.device)
        self.tables = [
            SceneTensors.of(
                draw_scenes(settings.num_scenes, seed=settings.seed + index, num_objects=len(self.sprites), aspect=width / height),
                processes.device,
            )
            for index, (width, height) in enumerate(settings.sizes)
        ]

    def batch(self, number: int) -> Tensor:
        """The pictures of batch `number`."""
        seed, weights = self.settings.seed, np.array(self.settings.weights)
        size = int(_random("size", seed, number).choice(len(weights), p=weights / weights.sum()))
        rows = _random("rows", seed, number).integers(self.settings.num_scenes, size=self.micro_batch)
        scenes = self.tables[size][torch.from_numpy(rows).to(self.processes.device)]
        width, height = self.settings.sizes[size]
        with torch.no_grad():
            return compose(scenes, self.sprites, width=width, height=height, colours=self.colours)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            pictures = self.batch(self.number)
            self.advance()
            yield {"pictures": pictures}


class FileSource(_Numbered):
    """Square crops at random places. Each epoch sees every picture once, in an order of its own, dealt out over the processes.

    A broken sample is counted and named to `log`, and another one takes its place. num_workers: threads that read ahead, without
    the interpreter's lock where Pillow decodes; 0: none.
    """

    def __init__(
        self,
        settings: FileSettings,
        *,
        micro_batch: int,
        processes: Processes,
        num_workers: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(processes)
        self.settings, self.micro_batch, self.num_workers, self.log = settings, micro_batch, num_workers, log
        self.root, self.items, broken = _find(settings)
        self.report = Report(total=len(self.items) + len(broken), max_share=settings.max_broken_share)
        for each in broken if processes.rank == 0 else ():  # all of them found the same
            self._say(each)
        self.report.broken += broken
        self.report.check()
        self._known: set[str] = set()
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> Tensor:
        """The pictures of batch `number`."""
        return self._collect([self._crop(position, item) for position, item in self._samples(number)])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.num_workers == 0:
            while True:
                pictures = self.batch(self.number)
                self.advance()
                yield {"pictures": pictures}
        with ThreadPoolExecutor(self.num_workers) as pool:
            begun: deque[list[Future[_Crop]]] = deque()
            while True:
                while len(begun) <= AHEAD:
                    begun.append(
                        [
                            pool.submit(self._crop, *sample)
                            for sample in self._samples(self.number + len(begun) * self.processes.world_size)
                        ]
                    )
                pictures = self._collect([future.result() for future in begun.popleft()])
                self.advance()
                yield {"pictures": pictures}

    def _samples(self, number: int) -> list[tuple[int, Item]]:
        """(position in the endless row of samples, item) of each row of a batch."""
        samples = []
        for position in range(number * self.micro_batch, (number + 1) * self.micro_batch):
            epoch, place = divmod(position, len(self.items))
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, _random("order", self.settings.seed, epoch).permutation(len(self.items))
            samples.append((position, self.items[self._order[1][place]]))
        return samples

    def _crop(self, position: int, item: Item) -> _Crop:
        """Of `item`, or of the first that is whole among some that are chosen by the position. May run on any thread."""
        rng, broken = _random("crop", self.settings.seed, position), []
        for _ in range(MAX_TRIES):
            try:
                image = decode(read_image(self.root, item), self.settings.max_pixels)
            except BrokenSample as error:
                broken.append(Broken(item.key, str(error)))
                item = self.items[int(rng.integers(len(self.items)))]
                continue
            side, short = self.settings.side, min(image.size)
            edge = min(short, int(side * rng.uniform(1, self.settings.max_shrink)))
            left, top = (int(rng.integers(whole - edge + 1)) for whole in image.size)
            square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
            return np.asarray(square), broken
        return None, broken

    def _say(self, broken: Broken) -> None:
        if self.log is not None:
            self.log(f"pictures: left out {broken}")

    def _collect(self, crops: list[_Crop]) -> Tensor:
        for each in (each for _, broken in crops for each in broken):
            if each.name not in self._known:
                self._known.add(each.name)
                self._say(each)
                self.report.add(each)
        pixels = [crop for crop, _ in crops if crop is not None]
        if len(pixels) < len(crops):
            raise DataError(f"{self.settings.path}: got {MAX_TRIES} broken samples in a row; expected pictures. Mend the data.")
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _find(settings: FileSettings) -> tuple[Path, tuple[Item, ...], tuple[Broken, ...]]:
    """Root, pictures and what is broken already: those of shards, or of a folder, where nothing else is asked of a picture."""
    path = settings.path
    shards = path.is_file() or (path.is_dir() and any(path.rglob("*.tar")))
    if shards:
        found = find(DataSettings(path=path, kind="shards", max_broken_share=settings.max_broken_share))
        return found.root, found.items, found.broken
    if not path.is_dir():
        raise DataError(f"pictures.path: got {path}: no such file or folder; expected pictures or shards. Set pictures.path=FOLDER")
    files = sorted(file for file in path.rglob("*") if file.suffix[1:].lower() in SUFFIXES and file.is_file())
    names = [file.relative_to(path).as_posix() for file in files if not file.name.startswith(".")]
    if not names:
        raise DataError(f"{path}: got no pictures; expected files of {', '.join(sorted(SUFFIXES))}, at any depth, or .tar shards.")
    parts = [Part(name, 0, (path / name).stat().st_size) for name in names]
    return path, tuple(Item(part.path, part, part) for part in parts), ()  # captions are not read, so any part does
