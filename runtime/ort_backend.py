"""Pictures from the portable graphs: one at a time, so that a picture never depends on its neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from engines.bundle import Bundle
from engines.spec import ComponentName
from engines.token_table import TABLE_NAME
from runtime.image import to_levels
from runtime.ort_session import OrtSession, cpu_name
from runtime.session import BackendName, Drawn, Job, StepCallback, Timings
from runtime.text_cache import TextCache
from runtime.token_table import TokenTable

__all__ = ["OrtBackend"]


class OrtBackend:
    """The sessions load when they are first used, and stay; with low_memory the text encoder goes after each use."""

    name: BackendName = "onnxruntime"
    max_batch = 1  # a larger one is no faster on a CPU, and would let the size of the batch decide the last bits

    def __init__(self, bundle: Bundle, *, num_threads: int | None = None, low_memory: bool = False) -> None:
        self.device, self._low_memory = cpu_name(), low_memory
        self._bundle, self._num_threads = bundle, num_threads
        self._sessions: dict[ComponentName, OrtSession] = {}
        self._texts = TextCache(
            lambda ids, mask: self.session("text_encoder").run({"input_ids": ids, "attention_mask": mask})["prompt_embeds"]
        )

    def files(self) -> tuple[str, ...]:
        manifest = self._bundle.manifest
        graphs = tuple(name for component in manifest.components for name in self._bundle.portable_files(component))
        return (*graphs, TABLE_NAME) if manifest.token_table_rows else graphs

    def session(self, component: ComponentName) -> OrtSession:
        if component not in self._sessions:
            self._sessions[component] = OrtSession(
                self._bundle.onnx_path(component),
                num_threads=self._num_threads,
                release_memory=component != "denoiser",
                table=TokenTable.of(self._bundle) if component == "text_encoder" else None,
            )
        return self._sessions[component]

    def draw(self, job: Job, on_step: StepCallback | None, tick: Callable[[], None]) -> Drawn:
        denoiser, schedule = self.session("denoiser"), job.schedule
        began = time.perf_counter()
        inputs = {
            "guidance_weights": job.guidance_weights,
            "prompt_mask": job.prompt_mask,
            **self.session("text_projection").run({"prompt_embeds": self._texts.embed_job(job)}),
        }
        if self._low_memory and (encoder := self._sessions.pop("text_encoder", None)):
            encoder.close()
        if job.guidance_scale is not None:
            inputs["guidance_scale"] = np.array([job.guidance_scale], np.float32)
        text_s = time.perf_counter() - began
        latents = job.latents() * np.float32(schedule.initial_scale)
        previous = zero = np.zeros_like(latents)
        steps_s = []
        for i, row in enumerate(schedule.table):
            began = time.perf_counter()
            noise = job.noise(i) if schedule.needs_noise(i) else zero
            step = {"latents": latents, "previous": previous, "coefficients": row, "noise": noise}
            outputs = denoiser.run(inputs | step)
            latents, previous = outputs["next_latents"], outputs["prediction"]
            steps_s.append(time.perf_counter() - began)
            tick()
            if on_step is not None:
                on_step(i + 1, latents.copy())  # a copy: what the callback does to it must not reach the picture
        began = time.perf_counter()
        images = self.session("decoder").run({"latents": latents})["images"]
        timings = Timings(text_s=text_s, steps_s=tuple(steps_s), decode_s=time.perf_counter() - began)
        return Drawn(levels=to_levels(images), timings=timings)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
