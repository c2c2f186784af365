"""What is timed: a component of a bundle by itself, or a picture from its prompt to the bytes of a PNG. Inputs are always the same.

On a GPU a component's inputs and outputs stay there and it is a CUDA graph, as in the runtime's own loop; in ONNX Runtime a run
takes and gives arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency_timing import Call, Sample, StreamMarks, Task, cpu_clock
from engines.errors import RequestError
from engines.spec import COMPONENTS, PX_PER_LATENT, ComponentName
from runtime import SanaEngine
from runtime.cuda import Slot
from runtime.graphs import Loop
from runtime.image import png_bytes
from runtime.noise import normal, normal_batch
from runtime.prompt import PromptTemplate, PromptTokenizer
from runtime.request import check_request
from runtime.schedule import make_schedule

__all__ = [
    "SEED",
    "WORKS",
    "Arrays",
    "Work",
    "component_inputs",
    "graph_inputs",
    "new_prompts",
    "num_tokens",
    "open_task",
    "queued",
    "step_inputs",
]

# The text projection is a part of a picture: by itself it has no peer.
WORKS = (*(name for name in get_args(ComponentName) if name != "text_projection"), "picture")
PROMPT = "a lighthouse on a cliff at dusk"  # of the figures
TEXT = "a lighthouse at dusk"
SEED = 5  # of pictures
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Work:
    component: str  # one of WORKS
    width: int  # px; of the text encoder tokens, 0 for as many as a prompt with its instruction has
    height: int
    batch: int  # pictures; of the text encoder, texts
    steps: int = 1  # of a picture

    def check(self, engine: SanaEngine) -> None:
        """Raises RequestError for what the bundle is not made for."""
        ranges, component = engine.manifest.ranges, self.component
        if component not in WORKS:
            raise RequestError(f"--components: got {component!r}; expected some of {', '.join(WORKS)}.")
        needed = {"picture": COMPONENTS, "denoiser": ("text_projection", "denoiser")}.get(component, (component,))
        if missing := [name for name in needed if name not in engine.manifest.components]:
            raise RequestError(
                f"--components: got {component}, without {', '.join(missing)} in {engine.bundle.path}; expected what can be done "
                f"with {', '.join(engine.manifest.components)}."
            )
        for name, side in (("width", self.width), ("height", self.height)) if component != "text_encoder" else ():
            if side % PX_PER_LATENT or not ranges.min_side <= side <= ranges.max_side:
                raise RequestError(
                    f"--sizes, {name}: got {side} px; expected a multiple of {PX_PER_LATENT} from {ranges.min_side} to "
                    f"{ranges.max_side}. Choose another size, or build the bundle with another range."
                )
        if not 1 <= self.batch <= ranges.max_batch:
            raise RequestError(
                f"--batches: got {self.batch}; the bundle takes 1 to {ranges.max_batch}. Build it with a larger one."
            )
        if component == "text_encoder":
            component_inputs(engine, self)  # its length
        if component == "picture":
            check_request(engine.manifest, prompts=TEXT, steps=self.steps, width=self.width, height=self.height)


def step_inputs(engine: SanaEngine, width: int, height: int, batch: int = 1) -> Arrays:
    """One step in the middle of a schedule: with guidance, by two texts (k = 2) or, where the model embeds its scale, one.

    The text is noise of unit variance. docs/bundle.md has the shapes, of text projection and denoiser.
    """
    manifest = engine.manifest
    channels, length = manifest.latents.channels, manifest.prompt.max_sequence_length
    grid = (channels, height // PX_PER_LATENT, width // PX_PER_LATENT)
    info = manifest.schedule
    num_steps = 2 if info.scheduler == "scm" else 20
    table = make_schedule(info.scheduler, num_steps, flow_shift=info.flow_shift, timestep_scale=info.timestep_scale).table
    texts = 1 if manifest.guidance_embeds else 2
    mask = np.ones((texts, batch, length), np.float32)
    if texts == 2:
        mask[0, :, 1:] = 0  # the empty negative prompt
    mask[-1, :, 40:] = 0
    text = normal(3, (texts, length, manifest.caption_channels))[:, None]
    inputs: Arrays = {
        "latents": normal_batch([1] * batch, grid),
        "previous": normal_batch([2] * batch, grid),
        "coefficients": table[num_steps // 2],
        "guidance_weights": np.array([1.0] if texts == 1 else [1 - info.guidance_scale, info.guidance_scale], np.float32),
        "prompt_embeds": np.ascontiguousarray(np.broadcast_to(text, (texts, batch, *text.shape[2:]))),
        "prompt_mask": mask,
    }
    if manifest.guidance_embeds:
        inputs |= {"guidance_scale": np.array([info.guidance_scale], np.float32), "noise": normal_batch([5] * batch, grid)}
    return inputs


def component_inputs(engine: SanaEngine, work: Work) -> Arrays:
    """By the names of the component's graph; the denoiser's text as a peer takes it, before its projection."""
    manifest = engine.manifest
    if work.component == "text_encoder":
        prompt = manifest.prompt
        template = PromptTemplate(
            complex_human_instruction=prompt.complex_human_instruction,
            max_sequence_length=prompt.max_sequence_length,
            lowercase=prompt.lowercase,
        )
        tokens = PromptTokenizer(engine.bundle.file("tokenizer/tokenizer.json"), template).encode([TEXT] * work.batch)
        length = work.width or tokens.ids.shape[1]
        if length > tokens.ids.shape[1] or length < prompt.max_sequence_length:
            raise RequestError(
                f"--text-tokens: got {length}; expected {prompt.max_sequence_length} to {tokens.ids.shape[1]}, a prompt with "
                "its instruction."
            )
        return {"input_ids": tokens.ids[:, :length], "attention_mask": tokens.mask[:, :length]}
    if work.component == "decoder":
        grid = (manifest.latents.channels, work.height // PX_PER_LATENT, work.width // PX_PER_LATENT)
        return {"latents": normal_batch([4] * work.batch, grid) * np.float32(manifest.latents.scaling_factor)}
    return step_inputs(engine, work.width, work.height, work.batch)


def num_tokens(engine: SanaEngine, work: Work) -> int:
    """Of one text of the text encoder; 0 of other components."""
    return work.width or component_inputs(engine, work)["input_ids"].shape[1] if work.component == "text_encoder" else 0


def graph_inputs(engine: SanaEngine, work: Work) -> Arrays:
    """As the component's graph takes them. Other requests to the engine wait meanwhile."""
    inputs = component_inputs(engine, work)
    if work.component == "denoiser":
        with engine.session("text_projection") as session:
            inputs |= session.run(inputs)
    return inputs


@contextmanager
def open_task(engine: SanaEngine, work: Work) -> Iterator[Task]:
    """The work, ready to be called again and again. Other requests to the engine wait, unless it is a picture.

    Raises RequestError for work that the bundle is not made for.
    """
    work.check(engine)
    if work.component == "picture":
        draw = _Draw(engine, work)
        yield Task("picture", draw, draw.watch)
        return
    inputs = graph_inputs(engine, work)
    with engine.session(work.component) as session:
        if engine.backend == "onnxruntime":
            yield Task(work.component, lambda: session.run(inputs), cpu_clock)
        else:
            with _on_gpu(session, inputs) as task:
                yield Task(work.component, task.call, task.stopwatch)


@contextmanager
def _on_gpu(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Task]:
    """session: a runtime.trt_session.TensorRTSession. A call launches one CUDA graph of it, as the runtime does, and does not wait.

    Launch by launch, Python would be timed: it takes longer than a fast GPU.
    """
    with queued(session, inputs) as launch:
        cuda = session._cuda
        launch()  # what is done once for a shape is not captured
        cuda.synchronize()
        loop = Loop(cuda, lambda marks: launch())
        try:
            yield Task("graph", loop.launch, StreamMarks(cuda))
        finally:
            cuda.synchronize()
            loop.close()


@contextmanager
def queued(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Callable[[], None]]:
    """What queues one run on the session's stream, with inputs that are on the device already, and does not wait."""
    cuda = session._cuda  # its stream is where events must be
    cuda.make_current()
    inputs = session.looked_up(inputs)
    slots = {name: Slot(cuda) for name in (*session.inputs, *session.outputs)}
    try:
        shapes = session.prepare({name: inputs[name].shape for name in session.inputs})
        addresses = {name: slots[name].write(session.device_array(name, inputs[name])) for name in session.inputs}
        for name, shape in shapes.items():
            addresses[name] = slots[name].reserve(session.output_size(name, shape))
        cuda.synchronize()

        def launch() -> None:
            session.launch(addresses)

        yield launch
    finally:
        cuda.make_current()
        for slot in slots.values():
            slot.close()


def new_prompts(batch: int) -> Callable[[], list[str]]:
    """Each call gives prompts that none gave before, so that their text is encoded and not remembered."""
    numbers = itertools.count()
    return lambda: [f"{next(numbers)} lighthouses at dusk" for _ in range(batch)]


class _Draw:
    """Pictures of new prompts."""

    def __init__(self, engine: SanaEngine, work: Work) -> None:
        self._engine, self._work, self._prompts = engine, work, new_prompts(work.batch)

    def __call__(self) -> None:
        work = self._work
        for picture in self._engine.generate(self._prompts(), seed=SEED, steps=work.steps, width=work.width, height=work.height):
            png_bytes(picture)

    def watch(self, call: Call) -> Sample:
        """On a GPU the device's time is the text's, the steps' and the decoder's."""
        found = cpu_clock(call)
        if self._engine.backend == "onnxruntime":
            return found
        return Sample(1000 * sum(timings.total_s for timings in self._engine.last_timings), found.wall_ms)
