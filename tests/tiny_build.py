"""A checkpoint that is as small as one can be, and a cache that the tests of one run share: exports take seconds, reuse nothing."""

from __future__ import annotations

import atexit
import functools
import io
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from tiny_checkpoint import TEXT_ENCODER, TRANSFORMER, VAE, write_checkpoint

from engines.spec import COMPONENTS, Precision, ShapeRange
from engines.store import Store
from export.components import Component, components
from export.progress import Progress
from export.request import BuildRequest
from export.stages import Runner
from sana_ref.checkpoint import Checkpoint, load

# One block of each kind; the decoder's deepest stage has attention, the finest is empty.
PARTS = {
    "transformer": replace(TRANSFORMER, num_layers=1, sample_size=4),
    "text_encoder": replace(TEXT_ENCODER, num_hidden_layers=1),
    "vae": replace(
        VAE,
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
    ),
}
RANGES = ShapeRange(min_side=64, opt_side=128, max_side=256, max_batch=4, max_sequence_length=24)


@functools.cache
def shared() -> Path:
    """A folder for this run of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="sana-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny() -> Path:
    """The checkpoint's folder. Do not write into it."""
    return write_checkpoint(shared() / "tiny", **PARTS)


def cache() -> Path:
    """The processes of one run share it: entries are named by what went into them, and appear whole (engines/store.py)."""
    return Path(os.environ["SANA_TESTS_CACHE"])


def quiet() -> Progress:
    return Progress(Console(file=io.StringIO(), width=1000))


def said(progress: Progress) -> str:
    assert isinstance(progress.console.file, io.StringIO)
    return progress.console.file.getvalue()


def request(out: Path, *, model: Path | None = None, precision: Precision = Precision.FP16, **options: object) -> BuildRequest:
    """Portable graphs of the tiny checkpoint, unless `options` say otherwise."""
    given = {"targets": (), "cache": cache()} | options
    return BuildRequest(model=str(model or tiny()), out=out, precision=precision, **given)  # type: ignore[arg-type]


def runner(checkpoint: Checkpoint | None = None, progress: Progress | None = None) -> Runner:
    return Runner(checkpoint=checkpoint or load(tiny()), store=Store(cache()), progress=progress or quiet())


def component(name: str, precision: Precision, checkpoint: Checkpoint | None = None) -> Component:
    checkpoint = checkpoint or load(tiny())
    return components(checkpoint, dict.fromkeys(COMPONENTS, precision))[name]  # type: ignore[index]
