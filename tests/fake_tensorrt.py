"""A GPU and a TensorRT that are not there: memory is the host's, engines are ONNX graphs run by ONNX Runtime.

What is queued on the stream is done when somebody waits, and not before. So a buffer that is written again too early, memory that
is freed while in use, and a missing wait all give wrong numbers here, as they would on a GPU. New memory is full of NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from fakes import open_session

from engines.bundle import Bundle
from engines.spec import LEVELS, NOT_FINITE
from export.level_nodes import add_levels
from runtime.bfloat16 import from_bfloat16, to_bfloat16
from runtime.cuda import GpuMemoryError
from runtime.kernel_cache import KernelCache
from runtime.trt_backend import TensorRTBackend
from runtime.trt_session import TensorRT

BLOCK = 1 << 16  # bytes; allocations of as many blocks get each other's addresses, as CUDA's do
POISON = 0xFF  # float32 of these bytes is NaN
OTHER_TYPES: dict[str, Any] = {"input_ids": np.int64, "attention_mask": np.int64, LEVELS: np.uint8, NOT_FINITE: np.int32}
KEYS_VALUES = ("text_keys", "text_values")
ROWS = "inputs_embeds"  # of a table on the host: bf16, as the text encoder


@dataclass
class Graph:
    work: list[Callable[[], None]]
    num_freed: int  # allocations, when it was captured
    launches: int = 0
    destroyed: bool = False


class FakeCuda:
    """The interface of runtime.cuda.Cuda."""

    stream = 77

    def __init__(self, *, memory: int = 1 << 30) -> None:
        self.memory = memory  # bytes
        self.allocations: dict[int, tuple[Any, int]] = {}
        self.pinned: dict[int, Any] = {}
        self.total_allocations = self.num_freed = self.waits = 0
        self._spare: dict[int, list[tuple[int, Any]]] = {}  # by blocks: what was freed
        self.largest = 0  # bytes held at once
        self.closed = False
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None
        self.graphs: list[Graph] = []
        self._clock = 0

    def enqueue(self, work: Callable[[], None]) -> None:
        (self._queue if self._captured is None else self._captured).append(work)

    def make_current(self) -> None:
        assert not self.closed

    def allocate(self, size: int) -> int:
        if sum(held for _, held in self.allocations.values()) + size > self.memory:
            raise GpuMemoryError("GPU memory: full")
        blocks = -(-size // BLOCK)
        address, buffer = self._spare[blocks].pop() if self._spare.get(blocks) else _aligned(blocks * BLOCK)
        self.allocations[address] = (buffer, size)
        self.total_allocations += 1
        self.largest = max(self.largest, sum(held for _, held in self.allocations.values()))
        return address

    def free(self, address: int) -> None:
        buffer, size = self.allocations.pop(address)
        ctypes.memset(address, POISON, size)
        self._spare.setdefault(-(-size // BLOCK), []).append((address, buffer))  # kept: a late write does not crash the tests
        self.num_freed += 1

    def allocate_pinned(self, size: int) -> int:
        address, buffer = _aligned(size)
        self.pinned[address] = buffer
        return address

    def free_pinned(self, address: int) -> None:
        del self.pinned[address]

    def to_device(self, device: int, host: int, size: int) -> None:
        self.check(device, size)
        self.enqueue(lambda: ctypes.memmove(device, host, size))

    def to_host(self, host: int, device: int, size: int) -> None:
        self.check(device, size)
        self.enqueue(lambda: ctypes.memmove(host, device, size))

    def zero(self, device: int, size: int) -> None:
        self.check(device, size)
        self.enqueue(lambda: ctypes.memset(device, 0, size))

    def synchronize(self) -> None:
        assert self._captured is None, "a capture does not wait"
        self.waits += 1
        while self._queue:
            self._queue.pop(0)()

    def idle(self) -> bool:
        """One piece of work is done whenever somebody asks."""
        if self._queue:
            self._queue.pop(0)()
        return not self._queue

    def mark(self, *, captured: bool = False) -> int:
        assert captured == (self._captured is not None)
        self._clock += 1
        return self._clock

    def capture(self, work: Callable[[], None]) -> Any:
        self._captured = []
        try:
            work()
            graph = Graph(self._captured, self.num_freed)
        finally:
            self._captured = None
        self.graphs.append(graph)
        return graph

    def launch_graph(self, graph: Any) -> None:
        assert not graph.destroyed
        assert graph.num_freed == self.num_freed, "it may name memory that was freed, and CUDA refuses its copies"
        graph.launches += 1
        self._queue.extend(graph.work)

    def destroy_graph(self, graph: Any) -> None:
        assert not graph.destroyed
        graph.destroyed = True

    def seconds(self, first: int, second: int) -> float:
        return (second - first) * 0.001

    def destroy(self, event: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def check(self, address: int, size: int) -> None:
        """Inside memory that is held."""
        assert any(start <= address and address + size <= start + held for start, (_, held) in self.allocations.items())

    @property
    def settled(self) -> bool:
        return not self._queue


def _aligned(size: int) -> tuple[int, Any]:
    buffer = (ctypes.c_uint8 * (size + 256))()
    address = -(-ctypes.addressof(buffer) // 256) * 256
    ctypes.memset(address, POISON, size)
    return address, buffer


def _array(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


MODULE = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user", STATIC="static"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", LAZY="lazy"),
    DataType=SimpleNamespace(BF16="bf16"),
    nptype=lambda dtype: dtype,
)


class FakeRuntimeCache:
    """The interface of IRuntimeCache: a line for each kernel. refuses: what TensorRT does with one of another environment."""

    refuses = False

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if self.refuses:
            return False
        lines = bytes(blob).decode().splitlines()
        assert lines.pop(0) == "kernels", "TensorRT was given bytes that are no cache"
        self.kernels.update(lines)
        return True

    def serialize(self) -> bytes:
        assert self.cuda._captured is None, "a cache is not written in a capture"
        return "\n".join(["kernels", *sorted(self.kernels)]).encode()


class FakeConfig:
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    allocation = "static"
    kernels: FakeRuntimeCache | None = None

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self.cuda)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.kernels = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy


class FakeEngine:
    """The interface of ICudaEngine, for a graph of a fake bundle. levels: it is a decoder's engine, as builds make them."""

    def __init__(self, graph: Path, cuda: FakeCuda, *, activations: int, levels: bool = False) -> None:
        self.cuda, self.activations = cuda, activations
        model = onnx.load(graph)
        if levels:
            add_levels(model)
        self.session = open_session(model.SerializeToString())
        self.names = [each.name for each in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.ranks = {each.name: len(each.shape) for each in self.session.get_inputs()}
        self.num_io_tensors = len(self.names)
        self.contexts: list[FakeContext] = []
        self.narrow: Any = None  # type of the text's keys and values: np.float16 or "bf16"; None: float32

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        if self.narrow is not None and name in KEYS_VALUES:
            return self.narrow
        if name == ROWS:
            return "bf16"
        return OTHER_TYPES.get(name, np.float32)

    def to_device_type(self, name: str, array: np.ndarray) -> np.ndarray:
        dtype = self.get_tensor_dtype(name)
        return to_bfloat16(array) if dtype == "bf16" else array.astype(dtype)

    def from_device_type(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = self.get_tensor_dtype(name)
        array = _array(address, np.uint16 if dtype == "bf16" else dtype, shape)
        return from_bfloat16(array) if dtype == "bf16" else array.astype(OTHER_TYPES.get(name, np.float32))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1,) * self.ranks[name], (2,) * self.ranks[name], (16,) * self.ranks[name]]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.cuda)

    def create_execution_context(self, config: FakeConfig) -> FakeContext:
        assert config.allocation == "user"
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        self.contexts.append(FakeContext(self, config.kernels))
        return self.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine, kernels: FakeRuntimeCache | None) -> None:
        self.engine, self.cuda, self.kernels = engine, engine.cuda, kernels
        self.compiled: list[str] = []  # what no cache had
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.launches: list[dict[str, int]] = []
        self.fails = False

    def _compile(self, kernel: str) -> None:
        have = self.kernels.kernels if self.kernels is not None else set(self.compiled)
        if kernel not in have:
            assert self.cuda._captured is None, "compiled in a capture"
            self.compiled.append(kernel)
            have.add(kernel)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return self.engine.activations

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0 and address != 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {key: np.zeros(shape, OTHER_TYPES.get(key, np.float32)) for key, shape in self.shapes.items()}
        return self.engine.session.run([name], zeros)[0].shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.cuda.stream
        assert self.memory[1] >= self.engine.activations
        addresses, shapes, memory = dict(self.addresses), dict(self.shapes), self.memory
        self.launches.append(addresses)
        self._compile(" ".join(f"{name}{shapes[name]}" for name in sorted(shapes)))

        def work() -> None:
            self.cuda.check(*memory)
            feeds = {}
            for name, shape in shapes.items():
                feeds[name] = self.engine.from_device_type(name, addresses[name], shape)
                self.cuda.check(addresses[name], self.engine.to_device_type(name, feeds[name]).nbytes)
            outputs = [name for name in self.engine.names if name not in self.engine.inputs]
            ctypes.memset(memory[0], 0xAA, self.engine.activations)  # scratch: whoever keeps something there loses it
            for name, value in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
                stored = self.engine.to_device_type(name, value)
                self.cuda.check(addresses[name], stored.nbytes)
                _array(addresses[name], stored.dtype, stored.shape)[...] = stored

        self.cuda.enqueue(work)
        return not self.fails


MACHINE = {"gpu": "a fake GPU", "sm": "sm89", "driver": "13.0", "tensorrt": "rtx 1.2.3"}
ACTIVATIONS = {"text_encoder": 5000, "text_projection": 6000, "denoiser": 70_000, "decoder": 30_000}  # bytes


def fake_backend(
    bundle: Bundle,
    *,
    cuda: FakeCuda | None = None,
    sm: str = "sm89",
    narrow: Any = None,
    kernel_cache: Path | None = None,
    machine: Mapping[str, str] = MACHINE,
    before_load: Callable[[str], None] = lambda component: None,
    levels: bool = True,
    **options: bool,
) -> TensorRTBackend:
    """A TensorRT backend whose engines are the bundle's portable graphs. `.engines` holds those that were loaded.

    narrow: type of the text's keys and values on the device: np.float16 or "bf16". machine: what kernels depend on.
    before_load: called with a component before its engine loads, in the thread that loads it. levels: engines are not of before.
    """
    cuda = cuda or FakeCuda()
    engines: dict[str, FakeEngine] = {}

    def load(path: Path) -> FakeEngine:
        component = path.parent.name
        before_load(component)
        engines[component] = FakeEngine(
            path.parent / "model.onnx", cuda, activations=ACTIVATIONS[component], levels=levels and component == "decoder"
        )
        engines[component].narrow = narrow
        return engines[component]

    library = TensorRT(module=MODULE, load=load, why=lambda: " TensorRT says: no.")
    kernels = None if kernel_cache is None else KernelCache(kernel_cache, machine=machine)
    backend = TensorRTBackend(
        bundle,
        tensorrt=library,
        cuda=cuda,
        sm=sm,
        device="a fake GPU",
        kernel_cache=kernels,
        **options,  # type: ignore[arg-type]
    )
    backend.engines = engines  # type: ignore[attr-defined]
    return backend
