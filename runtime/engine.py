"""SanaEngine: a bundle and a prompt become a picture. No PyTorch.

    with SanaEngine("out/sana-tiny") as engine:
        picture = engine.generate("a red apple on a yellow background", seed=7)[0]
        save_png(picture, "apple.png")

A picture depends on its request, the bundle, the backend and the device, and on how many pictures are drawn in one go (never on
which): ten runs give the same bytes, whatever ran before. All of that is in the picture's metadata, from which `replay` draws it
again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.bundle import Bundle
from engines.errors import RequestError, SanaError
from engines.spec import PX_PER_LATENT
from runtime.choose import make_backend
from runtime.image import INFO_KEY
from runtime.kernel_cache import kernel_folder
from runtime.noise import normal_batch
from runtime.picture_info import PictureInfo, RecipeInfo
from runtime.progress import StepBar
from runtime.prompt import PromptTemplate, PromptTokenizer
from runtime.request import Request, check_request
from runtime.schedule import Schedule
from runtime.session import Backend, BackendName, Job, Session, Text, Timings
from runtime.together import begun

__all__ = ["OnStep", "SanaEngine"]

_TOKENIZER = "tokenizer/tokenizer.json"

# on_step(step, total, latents): after each step, counted from 1 over all batches of the request. latents: (B, C, h, w) float32 of
# the batch being drawn, a copy. Whatever it raises cancels the request and comes out of generate().
OnStep = Callable[[int, int, NDArray[np.float32]], None]


class SanaEngine:
    """A bundle, ready to draw.

    backend: the name of what draws. backend_reason: why that. last_timings: of the latest request, one entry a batch.
    May be shared between threads: requests wait for one another.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        backend: str = "auto",
        verify: bool = True,
        num_threads: int | None = None,
        cuda_graphs: bool = True,
        low_memory: bool = False,
        kernel_cache: Path | str | bool = True,
        progress: bool | None = None,
    ) -> None:
        """bundle: a folder, or a Bundle that is open already.

        backend: "tensorrt", "onnxruntime", or "auto" (TensorRT where there is a GPU that the bundle has engines for).
        verify: first compare the SHA-256 of every file that this backend and the tokenizer open; `Bundle.verify` compares all. A
            Bundle that is open already is taken as it is. num_threads: of ONNX Runtime; all that this process may use unless given.
        cuda_graphs: with TensorRT, all of a picture's steps and its decoding are one launch, from the second picture of a size on,
            and a text is one. Without, Python queues each kernel, which takes it longer than a GPU of today needs to run it.
        low_memory: the text encoder is unloaded after use, and loaded for the next text; on a GPU the others make room for it.
        kernel_cache: with TensorRT for RTX, the folder where kernels that it compiled are kept for the next start; True means
            `kernels` in $SANA_CACHE_DIR or ~/.cache/sana, False none. It changes how long the first picture of a size takes.
        progress: a bar on stderr for what lasts over a second; None means if stderr is a terminal.
        Raises BundleError for a bad bundle, and what runtime.choose.make_backend raises.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=False)
        self.manifest = self.bundle.manifest
        prompt = self.manifest.prompt
        template = PromptTemplate(
            complex_human_instruction=prompt.complex_human_instruction,
            max_sequence_length=prompt.max_sequence_length,
            lowercase=prompt.lowercase,
        )
        made, self.backend_reason = make_backend(
            self.bundle,
            backend,
            num_threads=num_threads,
            cuda_graphs=cuda_graphs,
            low_memory=low_memory,
            kernel_cache=kernel_folder(kernel_cache),
        )
        try:
            if verify and self.bundle is not bundle:
                self.bundle.verify((_TOKENIZER, *made.files()))
            self._tokenizer = PromptTokenizer(self.bundle.file(_TOKENIZER), template)
        except BaseException:
            made.close()
            raise
        self._backend: Backend | None = made
        self.backend: BackendName = made.name
        self.device = made.device
        self.last_timings: tuple[Timings, ...] = ()
        self._progress = progress
        self._lock = threading.Lock()
        self._working: int | None = None  # the thread that holds the lock

    def generate(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        scheduler: str | Schedule | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """One RGB picture for each prompt, in order.

        prompts: text, at most 1024 of them; "" is allowed. A prompt that the model cannot read to its end is cut with a
        PromptCutWarning. More than the backend's batch are drawn in several batches.
        negative_prompts: one for all, or one each. seed: 0 to 2**64 - 1 for the first picture, the next integer for the next, or a
        list. steps: 1 to 1000. guidance: 0 to 100; 1 and below use the prompt alone. width, height: px, multiples of 32 within
        manifest.ranges. scheduler: a name, or a Schedule (from YAML: runtime.schedule.load_schedule).
        What is left out comes from the bundle. Raises RequestError, a ValueError, before anything is drawn.
        """
        request = check_request(
            self.manifest,
            prompts=prompts,
            negative_prompts=negative_prompts,
            seed=seed,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            scheduler=scheduler,
        )
        return self._draw(request, on_step)

    def replay(self, info: PictureInfo, on_step: OnStep | None = None) -> Image.Image:
        """Draw a picture again from its metadata: the same pixels on the same device.

        It is drawn in a batch as large as it was the first time. Raises RequestError if it came from another bundle or backend.
        """
        if info.bundle_digest != self.bundle.digest:
            raise RequestError(
                f"bundle: the picture was drawn by {info.model!r}, bundle {info.bundle_digest[:12]}…; "
                f"this is {self.manifest.model!r}, bundle {self.bundle.digest[:12]}…. Use the bundle that it was drawn with."
            )
        if info.backend != self.backend:
            raise RequestError(
                f"backend: the picture was drawn by {info.backend!r} on {info.device}; this is {self.backend!r} on {self.device}. "
                f"Open the bundle with backend={info.backend!r}."
            )
        count = info.batch_size
        if not info.batch_index < count <= self._living().max_batch:
            raise RequestError(
                f"batch: got picture {info.batch_index} of {count}; expected one of at most {self._living().max_batch}."
            )
        request = check_request(
            self.manifest,
            prompts=[info.prompt] * count,
            negative_prompts=info.negative_prompt,
            seed=[info.seed] * count,
            guidance=info.guidance,
            width=info.width,
            height=info.height,
            scheduler=info.schedule.recipe().make(),
        )
        return self._draw(request, on_step)[info.batch_index]

    def apply_lora(self, path: Path | str, scale: float = 1.0) -> NoReturn:
        """Reserved. Raises RequestError: engines cannot change their weights yet."""
        raise RequestError(
            f"apply_lora: got {str(path)!r} with a scale of {float(scale)!r}; engines cannot change their weights yet. Fuse the "
            "LoRA into the checkpoint, and build a bundle of that."
        )

    @contextmanager
    def session(self, component: str) -> Iterator[Session]:
        """One component's session, to run by hand (parity checks), while other requests wait."""
        if component not in self.manifest.components:
            raise RequestError(f"component: got {component!r}; expected one of {', '.join(self.manifest.components)}.")
        with self._exclusive() as backend:
            yield backend.session(component)

    def close(self) -> None:
        """Free all memory, after the request in progress. The engine draws no more."""
        with self._lock:
            if self._backend is not None:
                self._backend.close()
                self._backend = None

    def __enter__(self) -> SanaEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _living(self) -> Backend:
        if self._backend is None:
            raise SanaError("this SanaEngine is closed. Make another one.")
        return self._backend

    @contextmanager
    def _exclusive(self) -> Iterator[Backend]:
        if self._working == threading.get_ident():
            raise SanaError("SanaEngine was called from its own on_step. Let the request end first, or use a second engine.")
        with self._lock:
            self._working = threading.get_ident()
            try:
                yield self._living()
            finally:
                self._working = None

    def _draw(self, request: Request, on_step: OnStep | None) -> list[Image.Image]:
        texts = self._texts(request)  # first, so that a warning about a cut comes before the work
        largest, count = self._living().max_batch, len(request.prompts)
        batches = [range(start, min(start + largest, count)) for start in range(0, count, largest)]
        per_batch = request.schedule.num_steps
        pictures: list[Image.Image] = []
        timings: list[Timings] = []
        with self._exclusive() as backend, StepBar(per_batch * len(batches), shown=self._progress) as bar:
            for number, batch in enumerate(batches):
                drawn = backend.draw(
                    _job(request, texts, batch, self.manifest.latents.channels),
                    None if on_step is None else _count_on(on_step, number * per_batch, per_batch * len(batches)),
                    bar.advance,
                )
                timings.append(drawn.timings)
                for index, levels in enumerate(drawn.levels):
                    picture = Image.fromarray(levels)
                    info = self._info(request, batch[index], index, len(batch))
                    picture.info[INFO_KEY] = info.model_dump_json()
                    pictures.append(picture)
            self.last_timings = tuple(timings)
        return pictures

    def _texts(self, request: Request) -> list[list[Text]]:
        """k rows, one text for each picture in each."""
        rows = [self._tokenizer.encode(request.prompts)]
        if len(request.guidance_weights) == 2:
            rows.insert(0, self._tokenizer.encode(request.negative_prompts, negative=True))
        return [
            [
                Text(ids=ids, mask=mask, selected_mask=selected)
                for ids, mask, selected in zip(tokens.ids, tokens.mask, tokens.selected_mask, strict=True)
            ]
            for tokens in rows
        ]

    def _info(self, request: Request, number: int, index: int, batch_size: int) -> PictureInfo:
        return PictureInfo(
            prompt=request.prompts[number],
            negative_prompt=request.negative_prompts[number],
            seed=request.seeds[number],
            guidance=request.guidance,
            width=request.width,
            height=request.height,
            schedule=RecipeInfo.of(request.schedule.recipe),
            model=self.manifest.model,
            bundle_digest=self.bundle.digest,
            backend=self.backend,
            device=self.device,
            batch_size=batch_size,
            batch_index=index,
            program=f"sana-deploy {_version()}",
        )


def _job(request: Request, texts: list[list[Text]], batch: range, channels: int) -> Job:
    seeds = [request.seeds[i] for i in batch]
    shape = (channels, request.height // PX_PER_LATENT, request.width // PX_PER_LATENT)
    return Job(
        texts=tuple(tuple(row[i] for i in batch) for row in texts),
        guidance_weights=request.guidance_weights,
        guidance_scale=request.guidance if request.guidance_embeds else None,
        schedule=request.schedule,
        latents=begun(partial(normal_batch, seeds, shape)),
        noise=lambda step: normal_batch(seeds, shape, stream=step + 1),
    )


def _count_on(on_step: OnStep, before: int, total: int) -> Callable[[int, NDArray[np.float32]], None]:
    return lambda step, latents: on_step(before + step, total, latents)


@cache
def _version() -> str:
    """Kept, because finding and parsing the package's metadata takes half a millisecond."""
    try:
        return version("sana-deploy")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "(not installed)"
