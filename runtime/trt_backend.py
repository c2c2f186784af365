"""Pictures from TensorRT engines. Between the text's projection and the pixels nothing leaves the GPU and nobody waits for it.

The schedule's table is uploaded once; a step differs from the one before in addresses alone: its row of the table, and which of two
buffers holds the latents (and the prediction) that it reads and writes.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.spec import COMPONENTS, LEVELS, NOT_FINITE, ComponentName
from engines.token_table import TABLE_NAME
from runtime.cuda import ALIGNMENT, Cuda, GpuMemoryError, Marks, Slot
from runtime.graphs import Loops
from runtime.image import not_finite, to_levels
from runtime.kernel_cache import KernelCache
from runtime.session import BackendName, Drawn, Job, StepCallback, Timings
from runtime.text_cache import TextCache
from runtime.together import together
from runtime.token_table import TokenTable
from runtime.trt_session import Arena, TensorRT, TensorRTSession

__all__ = ["TensorRTBackend", "open_tensorrt"]

_POLL_S = 2e-4  # a step takes some milliseconds
_ROW = ALIGNMENT // 4  # float32s from one row of the table to the next on the device, so that every row is aligned


def open_tensorrt(
    bundle: Bundle, *, cuda_graphs: bool = True, low_memory: bool = False, kernel_cache: Path | None = None
) -> TensorRTBackend:
    """The backend for the GPU that is here. Cheapest check first; nothing of TensorRT loads before all have passed.

    kernel_cache: the folder where compiled kernels are kept; None keeps none.
    Raises NoGpuError, ArchitectureError if the bundle has no engine for this GPU, TensorRTVersionError.
    """
    from engines import tensorrt, tensorrt_library
    from plugins import shell

    info = tensorrt.device_info()
    for component in bundle.manifest.components:
        bundle.require_engine(component, info.sm)
    bundle.check_tensorrt(flavor=tensorrt.flavor(), version=tensorrt.version())
    tensorrt_library.logger()  # engines load in several threads: what is made once is made before
    shell.register(tensorrt.load())
    library = TensorRT(module=tensorrt.load(), load=tensorrt.deserialize, why=tensorrt_library.why)
    kernels = None
    if kernel_cache is not None:
        machine = {"gpu": info.name, "sm": info.sm, "driver": info.driver_cuda}
        machine["tensorrt"] = f"{tensorrt.flavor()} {tensorrt.version()}"
        kernels = KernelCache(kernel_cache, machine=machine)
    return TensorRTBackend(
        bundle,
        tensorrt=library,
        cuda=Cuda(),
        sm=info.sm,
        device=info.name,
        cuda_graphs=cuda_graphs,
        low_memory=low_memory,
        kernel_cache=kernels,
    )


class TensorRTBackend:
    """Engines load for the first picture, all at the same time, and stay.

    With low_memory the text encoder is never there at the same time as the others: for a new text they go, and come back.
    """

    name: BackendName = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        tensorrt: TensorRT,
        cuda: Cuda,
        sm: str,
        device: str,
        cuda_graphs: bool = True,
        low_memory: bool = False,
        kernel_cache: KernelCache | None = None,
    ) -> None:
        """sm: the device's architecture, "sm89". cuda_graphs: launch a picture's work as one graph from its second time on.
        kernel_cache: where compiled kernels are kept.

        Raises ArchitectureError if a component has no engine for it.
        """
        self.device, self.max_batch, self._bundle = device, bundle.manifest.ranges.max_batch, bundle
        self._sm, components = sm, bundle.manifest.components  # all of them, but in what development builds
        for component in components:
            bundle.require_engine(component, sm)
        names = {component: bundle.manifest.engine_name(component, sm) or "" for component in components}
        self._files = (*names.values(), *([TABLE_NAME] if bundle.manifest.token_table_rows else []))
        self._kernels = (
            {}
            if kernel_cache is None
            else {component: kernel_cache.kernels(bundle.manifest.files[name].sha256) for component, name in names.items()}
        )
        self.load_s: dict[ComponentName, float] = {}  # how long each engine took the last time
        self._tensorrt, self._cuda, self._arena = tensorrt, cuda, Arena(cuda)
        self._sessions: dict[ComponentName, TensorRTSession] = {}
        self._slots: dict[str, Slot] = {}
        self._cuda_graphs, self._low_memory = cuda_graphs, low_memory
        self._loops, self._text_loops = Loops(cuda), Loops(cuda, limit=2)
        self._steps_done = cuda.allocate_pinned(4)  # a float32 that a graph counts in
        self._texts = TextCache(self._encode)

    def _encode(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._low_memory and self._sessions.keys() - {"text_encoder"}:
            self._free_buffers()
            self._close_sessions(COMPONENTS)
        encoder = self.session("text_encoder")
        loops = self._text_loops if self._cuda_graphs and not self._low_memory else None
        found: NDArray[np.float32] = encoder.run({"input_ids": ids, "attention_mask": mask}, loops)["prompt_embeds"]
        return found

    def _close_sessions(self, components: Iterable[ComponentName]) -> None:
        for session in [self._sessions.pop(component) for component in components if component in self._sessions]:
            session.close()

    def files(self) -> tuple[str, ...]:
        return self._files

    def session(self, component: ComponentName) -> TensorRTSession:
        self._cuda.make_current()
        self._load([component])
        return self._sessions[component]

    def _load(self, components: Iterable[ComponentName]) -> None:
        """Those that are not there yet, at the same time: TensorRT's bindings let go of Python's lock while they load.

        If one fails, none of them stays.
        """
        work = {component: functools.partial(self._open, component) for component in components if component not in self._sessions}
        self._sessions |= together(work, discard=TensorRTSession.close)

    def _open(self, component: ComponentName) -> TensorRTSession:
        began = time.perf_counter()
        self._cuda.make_current()  # of this thread
        session = TensorRTSession(
            self._bundle.require_engine(component, self._sm),
            tensorrt=self._tensorrt,
            cuda=self._cuda,
            arena=self._arena,
            kernels=self._kernels.get(component),
            table=TokenTable.of(self._bundle) if component == "text_encoder" else None,
        )
        self.load_s[component] = time.perf_counter() - began
        return session

    def draw(self, job: Job, on_step: StepCallback | None, tick: Callable[[], None]) -> Drawn:
        self._cuda.make_current()
        try:
            drawn = self._draw(job, on_step, tick)
            for session in self._sessions.values():
                session.save_kernels()
            return drawn
        except GpuMemoryError:
            self._free_buffers()  # else what grew for this request would be missing to a smaller one
            raise
        finally:  # also after an error: buffers are used again by whoever comes next
            self._cuda.synchronize()
            for slot in self._slots.values():
                slot.settled()

    def _draw(self, job: Job, on_step: StepCallback | None, tick: Callable[[], None]) -> Drawn:
        schedule = job.schedule
        if not self._low_memory:
            self._load(COMPONENTS)
        began = time.perf_counter()
        embeds = self._texts.embed_job(job)
        if self._low_memory:
            self._close_sessions(["text_encoder"])
        text_s = time.perf_counter() - began
        self._load(component for component in COMPONENTS if component != "text_encoder")
        projection, denoiser, decoder = (self._sessions[name] for name in ("text_projection", "denoiser", "decoder"))

        noise = job.latents()
        shape, size = noise.shape, noise.nbytes
        embeds_address = self._slot("prompt_embeds").write(embeds)
        text = projection.prepare({"prompt_embeds": embeds.shape})
        text_addresses = {
            name: self._slot(name).reserve(projection.output_size(name, text_shape)) for name, text_shape in text.items()
        }
        fixed = self._upload_fixed(job)
        fresh = self._upload_noise(job, shape)
        table = self._slot("table").write(_padded(schedule.table))
        state = [(self._slot(f"latents_{i}"), self._slot(f"prediction_{i}")) for i in (0, 1)]
        for latents, prediction in state:
            latents.reserve(size)
            prediction.reserve(size)
        state[0][0].write(noise * np.float32(schedule.initial_scale))
        self._cuda.zero(state[0][1].address, size)

        pixels = decoder.prepare({"latents": shape})
        decoded = {name: self._slot(name).reserve(decoder.output_size(name, made)) for name, made in pixels.items()}
        shapes = {name: array.shape for name, array in fixed.items()}
        denoiser.prepare(
            shapes | text | dict.fromkeys(("latents", "previous", "noise"), shape) | {"coefficients": (schedule.table.shape[1],)}
        )
        addresses = {name: self._slot(name).address for name in fixed} | text_addresses

        def queue(marks: Marks, after_step: Callable[[int], None] | None = None) -> None:
            """All of a picture's work after its text; without after_step the steps that are done are counted for `_follow`."""
            marks.add()
            projection.launch(text_addresses | {"prompt_embeds": embeds_address})
            marks.add()
            for i in range(schedule.num_steps):
                (latents, previous), (after, prediction) = state[i % 2], state[(i + 1) % 2]
                step = {
                    "latents": latents.address,
                    "previous": previous.address,
                    "coefficients": table + i * ALIGNMENT,
                    "noise": fresh[i],
                    "next_latents": after.address,
                    "prediction": prediction.address,
                }
                denoiser.launch(addresses | step)
                marks.add()
                if after_step is None:
                    self._cuda.to_host(self._steps_done, table + (i + 1) * ALIGNMENT - 4, 4)
                else:
                    after_step(i)
            decoder.launch(decoded | {"latents": state[schedule.num_steps % 2][0].address})
            marks.add()

        def after_step(i: int) -> None:
            tick()
            if on_step is not None:
                on_step(i + 1, state[(i + 1) % 2][0].read(np.float32, shape))

        slots = [slot.address for pair in state for slot in pair]
        memory = (
            *addresses.values(),
            embeds_address,
            table,
            *fresh,
            *slots,
            *decoded.values(),
            self._arena.address,
            self._arena.size,
        )
        shaped = (shape, embeds.shape, *text.values(), schedule.num_steps)
        loop = self._loops.get((shaped, memory), queue) if self._cuda_graphs and on_step is None else None
        if loop is None:
            with Marks(self._cuda) as marks:
                queue(marks, after_step)
                levels = self._read(pixels)  # the one wait
                projection_s, *steps_s, decode_s = marks.seconds()
        else:
            ctypes.c_float.from_address(self._steps_done).value = 0
            loop.launch()
            self._follow(schedule.num_steps, tick)
            levels = self._read(pixels)
            projection_s, *steps_s, decode_s = loop.marks.seconds()
        text_s += projection_s
        return Drawn(levels=levels, timings=Timings(text_s=text_s, steps_s=tuple(steps_s), decode_s=decode_s))

    def _read(self, pixels: Mapping[str, tuple[int, ...]]) -> NDArray[np.uint8]:
        """Levels, once the decoder is done. pixels: shapes of its outputs."""
        if LEVELS not in pixels:  # of an engine of before
            return to_levels(self._slot("images").read(np.float32, pixels["images"], copy=False))
        bad = int(self._slot(NOT_FINITE).read(np.int32, pixels[NOT_FINITE], copy=False).sum())
        if bad:
            raise not_finite(bad)
        return self._slot(LEVELS).read(np.uint8, pixels[LEVELS], copy=False)

    def _follow(self, num_steps: int, tick: Callable[[], None]) -> None:
        """Tick for each step of a graph that runs, until all are done. It can be interrupted, unlike a wait of CUDA's."""
        counter = ctypes.c_float.from_address(self._steps_done)
        done = 0
        while done < num_steps:
            idle = self._cuda.idle()  # before the counter is read: what it says then is all
            for _ in range(int(counter.value) - done):
                tick()
                done += 1
            if idle:
                break
            time.sleep(_POLL_S)

    def _upload_fixed(self, job: Job) -> dict[str, NDArray[np.float32]]:
        """What is the same for every step, besides the text's keys and values."""
        fixed = {"guidance_weights": job.guidance_weights, "prompt_mask": job.prompt_mask}
        if job.guidance_scale is not None:
            fixed["guidance_scale"] = np.array([job.guidance_scale], np.float32)
        for name, array in fixed.items():
            self._slot(name).write(array)
        return fixed

    def _upload_noise(self, job: Job, shape: tuple[int, ...]) -> list[int]:
        """Addresses of each step's fresh noise; of zeros where there is none."""
        steps = [i for i in range(job.schedule.num_steps) if job.schedule.needs_noise(i)]
        size = math.prod(shape)
        stride = -(-4 * size // ALIGNMENT) * ALIGNMENT
        rows = np.zeros((1 + len(steps), stride // 4), np.float32)
        for row, i in zip(rows[1:], steps, strict=True):
            row[:size] = job.noise(i).reshape(-1)
        start = self._slot("noise").write(rows)
        place = {i: start + (1 + n) * stride for n, i in enumerate(steps)}
        return [place.get(i, start) for i in range(job.schedule.num_steps)]

    def _slot(self, name: str) -> Slot:
        return self._slots.setdefault(name, Slot(self._cuda))

    def _free_buffers(self) -> None:
        self._cuda.synchronize()
        self._loops.clear()  # which name the buffers
        self._text_loops.clear()
        for session in self._sessions.values():
            session.free_buffers()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
        self._arena.close()

    def close(self) -> None:
        self._cuda.make_current()
        self._free_buffers()
        self._cuda.free_pinned(self._steps_done)
        self._close_sessions(COMPONENTS)
        self._cuda.close()


def _padded(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """A row's last number is that of the step, from 1: `_follow` reads it."""
    padded = np.zeros((len(table), _ROW), np.float32)
    padded[:, : table.shape[1]] = table
    padded[:, -1] = np.arange(1, len(table) + 1)
    return padded
