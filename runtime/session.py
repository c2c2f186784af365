"""What stands between a request and compiled graphs.

A `Session` runs one component of a bundle. A `Backend` owns the sessions of a bundle on one kind of device and turns a `Job`, one
batch of pictures that is ready to be drawn, into pixels: text encoder once for each text, text projection once, denoiser once a
step, decoder once.

Dimensions: B pictures, k texts a picture (2 with guidance: negative, prompt), S and L tokens read and kept, C latent channels,
h and w latent cells, H and W px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.spec import ComponentName
from runtime.schedule import Schedule

__all__ = ["Arrays", "Backend", "BackendName", "Drawn", "Job", "Session", "StepCallback", "Text", "Timings"]

BackendName = Literal["tensorrt", "onnxruntime"]
Arrays = dict[str, NDArray[Any]]
F32 = NDArray[np.float32]

# Called after each step with its number (from 1) and the latents (B, C, h, w). What it raises ends the work.
StepCallback = Callable[[int, F32], None]


class Session(Protocol):
    """One component: arrays by the graph's input names in, arrays by its output names out. docs/bundle.md lists both.

    Floats are float32 in these arrays, whatever the graph takes and gives.
    """

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Text:
    """One tokenized text."""

    ids: NDArray[np.int64]  # (S,)
    mask: NDArray[np.int64]  # (S,), 1 for tokens
    selected_mask: F32  # (L,), the mask where the encoder's output is kept


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """One batch, ready to be drawn. Everything random is already in it or comes from `noise`."""

    texts: tuple[tuple[Text, ...], ...]  # k rows of B; the negative prompts first
    guidance_weights: F32  # (k,): [1 - g, g], or [1]
    guidance_scale: float | None  # what graphs that embed the scale are told; None for the others
    schedule: Schedule
    latents: Callable[[], F32]  # -> (B, C, h, w), standard normal; made while the text is encoded, and waited for
    noise: Callable[[int], F32]  # step -> (B, C, h, w), standard normal; asked for the steps that need it only

    @property
    def prompt_mask(self) -> F32:
        """(k, B, L)"""
        return np.stack([np.stack([text.selected_mask for text in row]) for row in self.texts])


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds of one batch. On a GPU steps are measured there, so that they add up without waiting for each."""

    text_s: float
    steps_s: tuple[float, ...]
    decode_s: float

    @property
    def total_s(self) -> float:
        return self.text_s + sum(self.steps_s) + self.decode_s


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawn:
    levels: NDArray[np.uint8]  # (B, H, W, 3), RGB; valid until the next job or close()
    timings: Timings


class Backend(Protocol):
    """A bundle on a device. Not for several threads at once: the engine queues requests."""

    name: BackendName
    device: str  # in words
    max_batch: int  # pictures in one job

    def files(self) -> tuple[str, ...]:
        """What it opens of the bundle, by the manifest's names."""
        ...

    def draw(self, job: Job, on_step: StepCallback | None, tick: Callable[[], None]) -> Drawn:
        """Draw a batch. `tick` is called whenever a step has been given to the device (for progress bars)."""
        ...

    def session(self, component: ComponentName) -> Session:
        """The session of one component, made when it is first asked for."""
        ...

    def close(self) -> None: ...
