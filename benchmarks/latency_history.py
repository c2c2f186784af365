"""benchmarks/history/<model>.jsonl: what runs of latency.py found, one JSON line for each piece of work, the oldest first.

A line is compared with lines of its own key: same model, component, backend, precision, size, batch, steps, machine, yardsticks
and peers. Bundle, commit and versions are not of the key, for they are what changes. A run is accepted if a person says so, and
the first of its work always, whatever takes turns with it; later runs are judged by the last of their key that was accepted.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.figures import ROOT
from engines.atomic import locked
from engines.errors import ManifestError, RequestError
from engines.strict import MAX_JSON_BYTES, read_bounded, validate_json

__all__ = ["HISTORY", "NARROW", "History", "Kernel", "Kernels", "Key", "Record", "Reference", "Times", "new_run"]

HISTORY = ROOT / "benchmarks" / "history"
BUSY = 1.1  # the wall clock's time over the processor's
MOST_BYTES = 16 * MAX_JSON_BYTES  # of one model's file

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
RunName = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Reference(_Model):
    """A yardstick or a peer, measured by turns with the work."""

    ms: Positive  # median
    ratio: Positive  # of the work to it: median of the paired ratios. Under 1: the work is faster
    ratios: tuple[Positive, ...]  # of each round, in order
    rms_error: NotNegative | None = None  # of a peer's output, relative; none for a yardstick
    clock: Literal["device", "wall"] = "device"  # whose times `ms` and `ratio` are of: wall for a picture's peers
    note: str = ""  # of a picture's peers: what the PNG takes of `ms`


class Times(_Model):
    """Milliseconds of one run of the work."""

    p50: Positive
    p90: Positive
    p99: Positive


NARROW = ("Fp8", "Int8")  # how kinds of kernels begin whose products are of numbers of 8 bits


class Kernel(_Model):
    """One kernel, or a layer of an engine, in one run of the work. Zero for what is not known."""

    name: Annotated[str, Field(max_length=300)]
    kind: str
    ms: NotNegative
    flops: NotNegative  # a multiply and an add are two
    bytes: NotNegative  # its inputs and outputs, weights included, once


class Kernels(_Model):
    """The costly ones, the slowest first, beside what the machine can do. why: where they are from, or why there are none."""

    why: str
    peak_flops: NotNegative = 0  # per second, of the fastest GEMM in the same run
    peak_narrow_flops: NotNegative = 0  # of a product in 8 bits in the same run; 0 where no kernel is one
    peak_bytes: NotNegative = 0  # per second, of a copy in the same run: read and written
    kernels: tuple[Kernel, ...] = ()


Key = tuple[str | int, ...]


class Record(_Model):
    schema_version: Literal[1] = 1
    run: RunName  # shared by all that one run of the program measured
    accepted: bool
    date: str  # ISO 8601, UTC
    model: str
    bundle: str  # the bundle's digest
    component: str  # text_encoder, denoiser, decoder, or picture: prompt to PNG
    backend: str
    precision: str  # the component's in the bundle; a picture's is the denoiser's
    width: int  # px; of the text encoder tokens, 0 for a prompt with its instruction
    height: int
    batch: int  # pictures; of the text encoder, texts
    steps: int  # of a picture; 1 for a component
    rounds: int
    device: Times  # by CUDA events on a GPU; on a CPU the processor's time, summed over threads
    wall: Times  # with everything that the host does, and the wait
    yardstick: str  # the name in `references` that it is judged by, if none other is asked for
    references: dict[str, Reference]
    turns: Literal["fixed", "each first"] = "fixed"  # how interleave() orders the references in a round
    # The most: of the GPU, beyond what was in use before the bundle was opened, or none where it was less, because another program
    # gave memory back meanwhile; of the process, on a CPU.
    memory_bytes: Annotated[int, Field(ge=0)] | None
    energy_j: Positive | None  # of the whole GPU, for one run of the work; none where NVML does not say
    energy_note: str
    clock_mhz: Positive | None = None  # of the GPU's multiprocessors, median after the samples; none where NVML does not say
    kernels: Kernels | None = None
    machine: str
    versions: dict[str, str]
    command: str
    commit: str
    note: str

    @property
    def work(self) -> Key:
        """What was done and where. A component on a GPU waits for no processor: of the machine the GPU alone counts."""
        size = (self.width, self.height, self.batch, self.steps)
        alone = self.backend == "tensorrt" and self.component != "picture"
        machine = self.machine.partition(", ")[0] if alone else self.machine
        return (self.model, self.component, self.backend, self.precision, *size, machine)

    @property
    def key(self) -> Key:
        """And all that took turns with it: peers leave other caches behind than a GEMM does, by 5 % of sana-tiny's step on a CPU,
        and another clock of a GPU. And, of several, in which order they did. Peers do wait for the processor."""
        turns = (self.turns,) if len(self.references) > 1 else ()
        return (*self.work, *((self.machine,) if self.has_peers else ()), *sorted(self.references), *turns)

    @property
    def has_peers(self) -> bool:
        return any(other.rms_error is not None for other in self.references.values())

    @property
    def was_busy(self) -> bool:
        """Whether other programs had the processor for much of the time. Of one thread of a CPU alone; else it cannot be told."""
        return self.backend == "onnxruntime" and self.wall.p50 > BUSY * self.device.p50

    @property
    def title(self) -> str:
        """In words, without the machine."""
        what = f"{self.component}, {self.steps} steps" if self.component == "picture" else self.component
        return f"{self.model} {what}, {self.precision}, {self.size}, {self.backend}"

    @property
    def size(self) -> str:
        """In words."""
        if self.component == "text_encoder":
            return f"{self.width} tokens, batch {self.batch}" if self.width else f"batch {self.batch}"
        return f"{self.width} x {self.height} px, batch {self.batch}"


class History:
    """The lines under a folder. Several programs may append at once."""

    def __init__(self, folder: Path = HISTORY) -> None:
        self.folder = folder

    def read(self) -> list[Record]:
        """All models', the oldest first. Raises ManifestError, naming file and line, for one that is no record."""
        records = []
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else []:
            for number, line in enumerate(read_bounded(path, limit=MOST_BYTES).splitlines(), 1):
                if line.strip():
                    try:
                        records.append(validate_json(Record, line, source=f"{path}:{number}"))
                    except ManifestError as error:  # its remedy is for a bundle
                        raise ManifestError(
                            f"{error}\nThat line is no record of a run. Remove it, or restore the file: git checkout."
                        ) from None
        return sorted(records, key=lambda record: record.date)

    def last_accepted(self, key: Key) -> Record | None:
        return next((record for record in reversed(self.read()) if record.accepted and record.key == key), None)

    def last_of_work(self, work: Key) -> Record | None:
        """The last accepted one, whatever took turns with it."""
        return next((record for record in reversed(self.read()) if record.accepted and record.work == work), None)

    def append(self, records: Sequence[Record]) -> None:
        """Write all or none of a model's lines."""
        for model in dict.fromkeys(record.model for record in records):
            lines = "".join(record.model_dump_json() + "\n" for record in records if record.model == model)
            # An editor or a merge may have taken the last line's end: two records on one line would be none.
            self._replace(self._path(model), lambda before, lines=lines: _ended(before) + lines)  # type: ignore[misc]

    def accept(self, run: str) -> int:
        """Mark all records of a run as accepted. Returns how many; raises RequestError if there is no such run."""
        chosen = [record for record in self.read() if record.run == run]
        if not chosen:
            known = ", ".join(dict.fromkeys(record.run for record in self.read()[-20:])) or "none"
            raise RequestError(f"--accept: got run {run!r}; the latest in {self.folder} are {known}.")

        def mark(before: str) -> str:
            rows = (Record.model_validate_json(line) for line in before.splitlines() if line.strip())
            return "".join(
                (row.model_copy(update={"accepted": True}) if row.run == run else row).model_dump_json() + "\n" for row in rows
            )

        for model in dict.fromkeys(record.model for record in chosen):
            self._replace(self._path(model), mark)
        return len(chosen)

    def _path(self, model: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('.-') or 'model'}.jsonl"

    def _replace(self, path: Path, change: Callable[[str], str]) -> None:
        """A reader sees the old file or the new one; a kill leaves either."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            before = path.read_text(encoding="utf-8") if path.is_file() else ""
            temporary = path.with_name(f".{path.name}.new")
            with open(temporary, "w", encoding="utf-8") as sink:
                sink.write(change(before))
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(temporary, path)


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def new_run() -> str:
    """A name for one run of the program."""
    return secrets.token_hex(6)
