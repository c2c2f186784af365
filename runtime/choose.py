"""Which backend draws, and why. One that was named is used or its error raised; "auto" says what it took and for what reason."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import get_args

from engines.bundle import Bundle
from engines.errors import ArchitectureError, NoGpuError, RequestError, TensorRTVersionError
from engines.spec import nearest
from runtime.session import Backend, BackendName

__all__ = ["make_backend"]

_WORDS = ("auto", *get_args(BackendName))


def make_backend(
    bundle: Bundle,
    wanted: str,
    *,
    num_threads: int | None = None,
    cuda_graphs: bool = True,
    low_memory: bool = False,
    kernel_cache: Path | None = None,
) -> tuple[Backend, str]:
    """The backend and the reason for it, which also goes to the logger "runtime".

    Opens no file of the bundle yet. kernel_cache: the folder where TensorRT's kernels are kept, if there is one.
    wanted: "tensorrt", "onnxruntime", or "auto": TensorRT where there is a GPU that the bundle has engines for, else ONNX Runtime.
    Raises RequestError for another word, and NoGpuError, ArchitectureError or TensorRTVersionError if "tensorrt" was named in vain.
    """
    if wanted not in _WORDS:
        raise RequestError(f"backend: got {wanted!r}; {nearest(str(wanted), _WORDS)}.")
    level = logging.INFO
    gpu = functools.partial(_tensorrt, bundle, cuda_graphs=cuda_graphs, low_memory=low_memory, kernel_cache=kernel_cache)
    cpu = functools.partial(_onnxruntime, bundle, num_threads=num_threads, low_memory=low_memory)
    if wanted != "auto":
        backend = gpu() if wanted == "tensorrt" else cpu()
        reason = "it was asked for"
    elif not bundle.manifest.targets:
        backend, reason = cpu(), "the bundle has portable graphs only"
    else:
        try:
            backend = gpu()
            reason = "the bundle has engines for this GPU"
        except NoGpuError as error:
            backend, reason = cpu(), f"TensorRT has nothing to run on: {error}"
        except (ArchitectureError, TensorRTVersionError) as error:
            level = logging.WARNING  # there is a GPU, and it stays idle
            backend, reason = cpu(), f"TensorRT cannot run this bundle here: {error}"
    logging.getLogger("runtime").log(level, "backend: %s on %s, because %s", backend.name, backend.device, reason)
    return backend, reason


def _onnxruntime(bundle: Bundle, *, num_threads: int | None, low_memory: bool) -> Backend:
    from runtime.ort_backend import OrtBackend

    return OrtBackend(bundle, num_threads=num_threads, low_memory=low_memory)


def _tensorrt(bundle: Bundle, *, cuda_graphs: bool, low_memory: bool, kernel_cache: Path | None) -> Backend:
    from runtime.trt_backend import open_tensorrt

    return open_tensorrt(bundle, cuda_graphs=cuda_graphs, low_memory=low_memory, kernel_cache=kernel_cache)
