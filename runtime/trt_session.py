"""One component as a TensorRT engine: shapes in, device addresses in, work queued on the stream.

Memory for activations belongs to the `Arena` that all engines of a bundle share: they run one after another on one stream, so the
arena is as large as the largest need and not the sum. Shape-specialised kernels are compiled eagerly, when a shape is first seen:
TensorRT for RTX would else run a fallback kernel until a background thread is done, and the pixels would depend on when that was.
runtime/kernel_cache.py keeps them for the next process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError, RequestError, SanaError
from plugins import shell
from runtime.bfloat16 import from_bfloat16, to_bfloat16
from runtime.cuda import ALIGNMENT, Cuda, Slot
from runtime.graphs import Loops
from runtime.kernel_cache import Kernels
from runtime.session import Arrays
from runtime.token_table import TokenTable

__all__ = ["Arena", "TensorRT", "TensorRTSession"]

Shape = tuple[int, ...]


class Arena:
    """Activation memory for engines that never run at the same time."""

    def __init__(self, cuda: Cuda) -> None:
        self._memory, self.size = Slot(cuda), 0

    def require(self, size: int) -> None:
        """Grow to `size` bytes, if it is smaller. May wait for the stream."""
        self._memory.reserve(size)
        self.size = max(self.size, size)

    @property
    def address(self) -> int:
        return self._memory.address

    def close(self) -> None:
        self._memory.close()
        self.size = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRT:
    """The library as sessions use it. One for a backend; tests have their own."""

    module: Any  # tensorrt_rtx or tensorrt
    load: Callable[[Path], Any]  # an engine's file -> ICudaEngine, its plugins registered
    why: Callable[[], str]  # what the library logged about its latest failure, as the end of a message


class TensorRTSession:
    """One engine's file with its execution context. Loads it at once."""

    def __init__(
        self,
        path: Path,
        *,
        tensorrt: TensorRT,
        cuda: Cuda,
        arena: Arena,
        kernels: Kernels | None = None,
        table: TokenTable | None = None,
    ) -> None:
        """kernels: those that were compiled for this engine before, and where new ones are kept; None keeps none.
        table: of tokens, whose rows the engine takes in place of ids.

        CUDA's context must be current. Raises what engines.tensorrt.deserialize raises.
        """
        trt, engine = tensorrt.module, tensorrt.load(path)
        self._engine, self._tensorrt, self._cuda, self._arena, self._path = engine, tensorrt, cuda, arena, path
        self._table = table
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = tuple(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(name for name in names if name not in self.inputs)
        dtypes = {name: engine.get_tensor_dtype(name) for name in names}
        self._bfloat16 = {name for name, dtype in dtypes.items() if dtype == trt.DataType.BF16}
        self._dtypes = {  # on the device
            name: np.dtype(np.uint16 if name in self._bfloat16 else trt.nptype(dtype)) for name, dtype in dtypes.items()
        }
        self._shapes: dict[str, Shape] = {}
        self._settled = False  # whether the context has run with those shapes
        self._needed = 0  # bytes of the arena, for those shapes
        self._memory = (0, 0)  # address and size of the arena that the context was told of
        self._slots: dict[str, Slot] = {}
        self._kernels = kernels
        self._compiled: set[frozenset[tuple[str, Shape]]] = set()  # shapes that have their kernels
        self._unsaved = True  # kernels were compiled since they were last saved
        self._context = self._make_context()

    def _make_context(self) -> Any:
        trt = self._tensorrt.module
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT for RTX only
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._kernels is not None:
            self._kernels.attach(config)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise SanaError(f"{self._path}: TensorRT made no execution context for it.{self._why()}")
        return context

    def prepare(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the input shapes, and have the arena hold what they need. Returns the output shapes.

        Raises RequestError for a shape outside the engine's range, BundleError if an input is missing.
        """
        wanted = {name: tuple(shapes[name]) for name in self.inputs if name in shapes}
        if missing := [name for name in self.inputs if name not in wanted]:
            raise BundleError(f"{self._path}: the engine wants {', '.join(missing)}; got {', '.join(shapes)}. Rebuild the bundle.")
        if wanted != self._shapes:
            self._shapes, self._settled = {}, False
            for name, shape in wanted.items():
                self._check_range(name, shape)
                if not self._context.set_input_shape(name, shape):
                    raise SanaError(f"{self._path}: TensorRT refused the shape {shape} of {name!r}.{self._why()}")
            self._needed = max(ALIGNMENT, int(self._context.update_device_memory_size_for_shapes()))
            self._shapes = wanted
            if (shapes_of_all := frozenset(wanted.items())) not in self._compiled:
                self._compiled.add(shapes_of_all)
                self._unsaved = True
        self._arena.require(self._needed)
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self.outputs}

    def _check_range(self, name: str, shape: Shape) -> None:
        low, _, high = (tuple(each) for each in self._engine.get_tensor_profile_shape(name, 0))
        fits = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if not fits:
            raise RequestError(
                f"{self._path}, input {name!r}: got shape {shape}; the engine serves {low} to {high}. "
                "Ask for another size or a smaller batch, or rebuild with another range."
            )

    def launch(self, addresses: Mapping[str, int]) -> None:
        """Queue one run on the stream, for the shapes that were prepared. addresses: device memory of every input and output."""
        memory = (self._arena.address, self._arena.size)
        if memory != self._memory:  # it grows when another size, or another engine, needs more
            self._context.set_device_memory(*memory)
            self._memory = memory
        for name in (*self.inputs, *self.outputs):
            if not self._context.set_tensor_address(name, addresses[name]):
                raise SanaError(f"{self._path}: TensorRT refused the address of {name!r}.")
        if not self._context.execute_async_v3(self._cuda.stream):
            raise SanaError(f"{self._path}: TensorRT could not run the engine.{self._why()}")
        self._settled = True

    def output_size(self, name: str, shape: Shape) -> int:
        """bytes"""
        return math.prod(shape) * int(self._dtypes[name].itemsize)

    def run(self, inputs: Mapping[str, NDArray[Any]], loops: Loops | None = None) -> Arrays:
        """Arrays in, arrays out, and wait. Inputs that the engine does not have are left out. float32 for every type of float.

        loops: from the second time on with these shapes, one after the other, it is one launch of a CUDA graph, which is kept
        there. They must be cleared before the session is closed or its buffers freed.
        """
        self._cuda.make_current()
        inputs = self.looked_up(inputs)
        shapes = self.prepare({name: array.shape for name, array in inputs.items()})
        addresses = {}
        for name in self.inputs:
            addresses[name] = self._slot(name).write(self.device_array(name, inputs[name]))
        for name, shape in shapes.items():
            addresses[name] = self._slot(name).reserve(self.output_size(name, shape))
        loop = None
        if loops is not None and self._settled:
            key = (*self._shapes.items(), *addresses.items(), self._arena.address, self._arena.size)  # of one engine
            loop = loops.get(key, lambda _: self.launch(addresses))
        if loop is None:
            self.launch(addresses)
        else:
            loop.launch()
        found = {name: self._host_array(name, self._slot(name).read(self._dtypes[name], s)) for name, s in shapes.items()}
        for slot in self._slots.values():
            slot.settled()
        return found

    def looked_up(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """As the engine takes them: with rows of the table in place of token ids, if it has one."""
        return inputs if self._table is None else self._table.looked_up(inputs, bits=True)

    def device_array(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """An input in the engine's own type; bfloat16 as its bits, and bits as they are. Raises SanaError for other types."""
        dtype = self._dtypes[name]
        if name in self._bfloat16 and array.dtype == dtype:
            return array
        expected = np.dtype(np.float32) if name in self._bfloat16 or dtype == np.float16 else dtype
        if array.dtype != expected:
            raise SanaError(f"{self._path}, input {name!r}: got {array.dtype}; expected {expected}.")
        return to_bfloat16(array) if name in self._bfloat16 else array.astype(dtype, copy=False)

    def _host_array(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        if name in self._bfloat16:
            return from_bfloat16(array)
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _why(self) -> str:
        plugin = f" A plugin said: {shell.failures[-1]}" if shell.failures else ""
        return self._tensorrt.why() + plugin

    def _slot(self, name: str) -> Slot:
        return self._slots.setdefault(name, Slot(self._cuda))

    def free_buffers(self) -> None:
        """Give back what run() holds for inputs and outputs."""
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()

    def save_kernels(self) -> None:
        """Keep what was compiled since the last time. Not while a CUDA graph is captured."""
        if self._kernels is not None and self._unsaved:
            self._kernels.save()
        self._unsaved = False

    def close(self) -> None:
        self.free_buffers()
        self.save_kernels()
        self._context = None  # first: a context must not outlive its kernels and its engine
        if self._kernels is not None:
            self._kernels.close()
        self._engine = self._table = None
