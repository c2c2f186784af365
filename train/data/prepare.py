"""`python -m train.data prepare`: the cache of a data set, by one process or several."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from train.data.cache import Writer, read_json
from train.data.errors import DataError
from train.data.settings import DataSettings
from train.data.source import find

__all__ = ["Progress", "prepare", "prepare_with", "say", "summary"]

PATIENCE_S = 2.0  # seconds between two lines


class Progress:
    """Called with how many are done and how many there are: a line on stderr, at most one every PATIENCE_S."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began, self._said = time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done in (0, total) or now - self._said >= PATIENCE_S:
            self._said = now
            say(f"{done} of {total} {self._what}, {now - self._began:.0f} s")


def say(text: str) -> None:
    print(f"data: {text}", file=sys.stderr, flush=True)


def prepare(settings: DataSettings, *, model: str, out: Path, dtype: str, device: str, part: tuple[int, int] | None) -> Path:
    """Returns the cache's folder; it has no index.json while other workers are busy. Raises DataError, SanaError.

    part: this process is worker I of N; None: the only one.
    """
    import torch

    from train.data.encoders import CheckpointEncoders

    number, parts = part or (0, 1)
    found = find(settings)
    if number == 0:
        say(f"{settings.path}: {len(found.items)} samples, {len(found.broken)} broken by their names and headers")
    # Sums depend on how many threads share them, and the cache's bytes must not: processes are the parallelism.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    encoders = CheckpointEncoders(model, dtype=getattr(torch, dtype), device=_device(device, number))
    writer = Writer(found, encoders, settings, out)
    return writer.write(part=number, parts=parts, on_shard=Progress("shards") if number == 0 else None)


def prepare_with(workers: int, arguments: Sequence[str]) -> Path:
    """The same, by this command once more in each of `workers` processes. Raises DataError when one fails."""
    command = [sys.executable, "-m", "train.data", *arguments]
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, "--part", f"{number}/{workers}"], stdout=subprocess.PIPE, text=True, errors="surrogateescape"
                )
            )
            for number in range(workers)
        ]
        try:
            printed = [child.communicate()[0] for child in children]
        except BaseException:  # Ctrl-C reached them too; whatever else it was, none is left behind
            for child in children:
                child.terminate()
            for child in children:
                child.wait()  # Popen's own way out does not, after Ctrl-C
            raise
    codes = [child.returncode for child in children]
    if any(codes):
        raise DataError(f"{sum(map(bool, codes))} of {workers} workers failed (exit codes {codes}); what they said is above.")
    return Path(printed[0].rstrip("\n"))


def summary(folder: Path) -> str:
    """What a finished cache holds, in a line."""
    shards, report = read_json(folder / "index.json")["shards"], read_json(folder / "report.json")
    samples, size = sum(shard["samples"] for shard in shards), sum(shard["bytes"] for shard in shards)
    text = f"{samples} samples in {len(shards)} shards, {size / 1e6:.1f} MB"
    return text + (f"; {report['broken']} broken, named in {folder / 'report.json'}" if report["broken"] else "; none broken")


def _device(device: str, number: int) -> str:
    """auto: this worker's GPU, or the CPU where there is none."""
    import torch

    if device != "auto":
        return device
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else "cpu"
