"""The CUDA driver, as far as a runtime needs it: one context, one stream, memory, copies and events.

All work goes to one stream, in order. Addresses are plain integers, as TensorRT takes them. A `Slot` is device memory for one
tensor with page-locked host memory beside it: it grows and never shrinks, so that a second picture of the same size allocates
nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.disk import human_bytes
from engines.errors import SanaError

__all__ = ["ALIGNMENT", "Cuda", "GpuMemoryError", "Marks", "Slot"]

ALIGNMENT = 256  # bytes; what TensorRT asks of the addresses it is given


class GpuMemoryError(SanaError):
    """The GPU has not enough free memory for a request."""


class Cuda:
    """The primary context of the first visible GPU (CUDA_VISIBLE_DEVICES chooses which that is)."""

    def __init__(self) -> None:
        """After engines.gpu.device_info(), which says what is wrong where there is no GPU. Raises SanaError for the rest."""
        from cuda.bindings import driver

        self._driver = driver
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.make_current()
        self._stream = self._call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self.num_freed = 0  # allocations

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        self._check(name, status)
        return values[0] if values else None

    def _check(self, name: str, status: Any) -> None:
        if int(status):
            text = self._driver.cuGetErrorString(status)[1]
            raise SanaError(f"CUDA, {name}: {text.decode() if text else status}. Work that was queued before may be the cause.")

    def make_current(self) -> None:
        """CUDA's current context belongs to the thread: each thread calls this before it works."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Device memory, aligned to ALIGNMENT. Raises GpuMemoryError, saying how much there was, if it is not to be had."""
        status, address = self._driver.cuMemAlloc(size)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            _, free, total = self._driver.cuMemGetInfo()
            raise GpuMemoryError(
                f"GPU memory: got {human_bytes(free)} free of {human_bytes(total)}; expected {human_bytes(size)}. "
                "Draw smaller pictures, or fewer at a time, or close other programs that use the GPU."
            )
        self._check("cuMemAlloc", status)
        return int(address)

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)
        self.num_freed += 1

    def allocate_pinned(self, size: int) -> int:
        return int(self._call("cuMemAllocHost", size))

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def to_device(self, device: int, host: int, size: int) -> None:
        """Queue a copy. The host memory must stay as it is until the stream has done it."""
        self._call("cuMemcpyHtoDAsync", device, host, size, self._stream)

    def to_host(self, host: int, device: int, size: int) -> None:
        """Queue a copy. The host memory holds it after synchronize()."""
        self._call("cuMemcpyDtoHAsync", host, device, size, self._stream)

    def zero(self, device: int, size: int) -> None:
        self._call("cuMemsetD8Async", device, 0, size, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        self._call("cuStreamSynchronize", self._stream)

    def idle(self) -> bool:
        """Whether the stream is empty. Does not wait."""
        (status,) = self._driver.cuStreamQuery(self._stream)
        if status == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._check("cuStreamQuery", status)
        return True

    def mark(self, *, captured: bool = False) -> Any:
        """An event at this point of the stream. Marks gives it back. captured: each launch of the graph records it again."""
        event = self._call("cuEventCreate", int(self._driver.CUevent_flags.CU_EVENT_DEFAULT))
        if captured:
            external = int(self._driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)
            self._call("cuEventRecordWithFlags", event, self._stream, external)
        else:
            self._call("cuEventRecord", event, self._stream)
        return event

    def seconds(self, first: Any, second: Any) -> float:
        """Time between two events that have passed."""
        return float(self._call("cuEventElapsedTime", first, second)) / 1000

    def destroy(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` queues on the stream, as a graph that can be launched again and again; it does not run now.

        Raises what `work` raises, and SanaError for work that CUDA cannot capture.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            _, graph = self._driver.cuStreamEndCapture(self._stream)  # the stream must be a usual one again
            if graph is not None and int(graph):
                self._call("cuGraphDestroy", graph)
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any) -> None:
        self._call("cuGraphLaunch", graph, self._stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)


class Marks:
    """Points of the stream, to measure between: `with Marks(cuda) as marks: marks.add()`."""

    def __init__(self, cuda: Cuda, *, captured: bool = False) -> None:
        """captured: they are added while work is captured, and tell the times of the graph's latest run."""
        self._cuda, self._captured = cuda, captured
        self._events: list[Any] = []

    def __enter__(self) -> Marks:
        return self

    def add(self) -> None:
        self._events.append(self._cuda.mark(captured=self._captured))

    def seconds(self) -> list[float]:
        """Between neighbouring marks, all of which have passed."""
        return [self._cuda.seconds(a, b) for a, b in pairwise(self._events)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for event in self._events:
            self._cuda.destroy(event)
        self._events.clear()


class Slot:
    """Device memory of one tensor, and its page-locked twin."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.address = 0  # on the device
        self._size = 0  # bytes, of both
        self._host = 0
        self._written = False  # a copy from the host memory may still be under way

    def reserve(self, size: int) -> int:
        """At least `size` bytes; what they held may be lost. Returns the device address."""
        if size > self._size:
            self.close()
            self.address = self._cuda.allocate(size)
            self._size = size
        return self.address

    def write(self, array: NDArray[Any]) -> int:
        """Queue a copy of `array` to the device. Returns the device address."""
        array = np.ascontiguousarray(array)
        self.reserve(array.nbytes)
        if self._written:  # twice without reading in between: the first copy must have left the host memory
            self._cuda.synchronize()
        self._view(array.dtype, array.shape)[...] = array
        self._cuda.to_device(self.address, self._host, array.nbytes)
        self._written = True
        return self.address

    def read(self, dtype: DTypeLike, shape: tuple[int, ...], *, copy: bool = True) -> NDArray[Any]:
        """Wait for the stream, and copy the tensor to an array of its own; without `copy`, to one that the next use overwrites."""
        view = self._view(np.dtype(dtype), shape)
        self._cuda.to_host(self._host, self.address, view.nbytes)
        self._cuda.synchronize()
        self._written = False
        return view.copy() if copy else view

    def settled(self) -> None:
        """The stream is known to be empty: the host memory is free to be written."""
        self._written = False

    def _view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        if not self._host:
            self._host = self._cuda.allocate_pinned(self._size)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = (ctypes.c_uint8 * size).from_address(self._host)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def close(self) -> None:
        """Free both, after the stream is done with them."""
        if self._size:
            self._cuda.synchronize()
            self._cuda.free(self.address)
            if self._host:
                self._cuda.free_pinned(self._host)
        self.address = self._size = self._host = 0
        self._written = False
