"""What a node does when it runs: a kernel that the CUDA driver launches, or a product that cuBLASLt computes.

plugins/cpp/work.cpp has the same classes. Needs numpy and cuda-bindings, never Triton or PyTorch.
"""

import ctypes
from typing import Any

import numpy as np

from plugins import cublas_lt
from plugins.launch import Kernel, Launch, LaunchError, Product, evaluate

__all__ = ["Arguments", "DriverError", "KernelWork", "ProductWork"]

WARP = 32  # threads
ALIGNMENT = 16  # bytes: the kernels load this much at once
MAX_GRID = (2**31 - 1, 65535, 65535)  # blocks, on every CUDA GPU
PLAIN_SHARED = 48 * 1024  # bytes of dynamic shared memory that a kernel may have without asking

_functions: dict[tuple[int, str], Any] = {}  # (CUDA context id, cubin's SHA-256): the loaded kernel, never unloaded


class DriverError(RuntimeError):
    """A CUDA driver call failed."""


def _ok(result: tuple[Any, ...], call: str) -> Any:
    """Unpack what a cuda-bindings call returned. Raises DriverError with the call and CUDA's own name and text for the error."""
    if int(result[0]):
        from cuda.bindings import driver

        name, text = (driver.cuGetErrorName(result[0])[1], driver.cuGetErrorString(result[0])[1])
        raise DriverError(f"{call}: got {(name or b'?').decode()}: {(text or b'?').decode()}")
    return result[1] if len(result) > 1 else None


def _load(launch: Launch, cubins: bytes) -> tuple[Any, Kernel]:
    """(function, description) of the kernel for the current CUDA context's device.

    Raises LaunchError if the node has no cubin for it, DriverError if CUDA refuses the cubin.
    """
    from cuda.bindings import driver

    context = _ok(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
    if not int(context):
        raise DriverError(f"{launch.op}: no CUDA context is current in this thread; expected TensorRT to have made one")
    device = _ok(driver.cuCtxGetDevice(), "cuCtxGetDevice")
    attribute = driver.CUdevice_attribute
    major, minor = (
        _ok(driver.cuDeviceGetAttribute(which, device), "cuDeviceGetAttribute")
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    sm = f"sm{major}{minor}"
    cubin = launch.cubin(cubins, sm)
    kernel = launch.kernels[sm]
    key = (_ok(driver.cuCtxGetId(context), "cuCtxGetId"), kernel.sha256)  # an id, unlike a handle, is never used again
    if key not in _functions:
        module = _ok(driver.cuModuleLoadData(cubin), f"{launch.op}: cuModuleLoadData of the {sm} cubin")
        function = _ok(
            driver.cuModuleGetFunction(module, kernel.entry.encode()), f"{launch.op}: cuModuleGetFunction({kernel.entry})"
        )
        if kernel.shared > PLAIN_SHARED:
            which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _ok(driver.cuFuncSetAttribute(function, which, kernel.shared), f"{launch.op}: {kernel.shared} bytes of shared memory")
        _functions[key] = function
    return _functions[key], kernel


class Arguments:
    """A kernel's arguments as cuLaunchKernel takes them: 8 bytes for each, and the array of their addresses.

    Made once; a launch then only writes pointers. `at` is the address to pass as kernelParams.
    """

    def __init__(self, launch: Launch) -> None:
        self._values = (ctypes.c_uint64 * len(launch.args))()  # a scalar lies in the first, little-endian, bytes of its slot
        start, size = ctypes.addressof(self._values), ctypes.sizeof(ctypes.c_uint64)
        self._addresses = (ctypes.c_void_p * len(launch.args))(*(start + size * i for i in range(len(launch.args))))
        self.at = ctypes.addressof(self._addresses)
        self._inputs = [(slot, arg[1]) for slot, arg in enumerate(launch.args) if arg[0] == "in"]
        self._outputs = [(slot, arg[1]) for slot, arg in enumerate(launch.args) if arg[0] == "out"]
        self._numbers = [(slot, arg[1]) for slot, arg in enumerate(launch.args) if arg[0] == "i32"]
        self._op = launch.op
        for slot, arg in enumerate(launch.args):
            if arg[0] == "f32":
                self._values[slot] = int(np.float32(arg[1]).view(np.uint32))

    def set_shapes(self, dims: list[tuple[int, ...]]) -> None:
        """Write the scalars for input shapes `dims`. Raises LaunchError for one that 32 bits do not hold."""
        for slot, expression in self._numbers:
            value = evaluate(expression, dims)
            if not -(2**31) <= value < 2**31:
                raise LaunchError(f"{self._op}: got shapes {dims}, where {expression!r} is {value}; expected a number of 32 bits")
            self._values[slot] = value & 0xFFFFFFFF

    def set_addresses(self, inputs: list[int], outputs: list[int]) -> None:
        """Write device addresses. Raises LaunchError unless all are aligned, which the kernel relies on."""
        values, seen = self._values, 0
        for slot, index in self._inputs:
            values[slot] = inputs[index]
            seen |= inputs[index]
        for slot, index in self._outputs:
            values[slot] = outputs[index]
            seen |= outputs[index]
        if seen % ALIGNMENT:
            found = ", ".join(map(hex, (*inputs, *outputs)))
            raise LaunchError(f"{self._op}: got tensors at {found}; expected addresses that are multiples of {ALIGNMENT} bytes")


class KernelWork:
    """A node's kernel, loaded for the current CUDA context's device, with its arguments. dims: that it is prepared for."""

    workspace = 0  # bytes

    def __init__(self, launch: Launch, cubins: bytes) -> None:
        """Raises as _load."""
        from cuda.bindings import driver

        self.launch, self._arguments, self._driver = launch, Arguments(launch), driver
        self._function, self.kernel = _load(launch, cubins)
        self._threads = WARP * self.kernel.warps
        self._grid: tuple[int, ...] = (0, 0, 0)
        self.dims: list[tuple[int, ...]] = []

    def prepare(self, dims: list[tuple[int, ...]]) -> None:
        grid = tuple(evaluate(expression, dims) for expression in self.launch.grid)
        if any(not 0 <= size <= limit for size, limit in zip(grid, MAX_GRID, strict=True)):
            raise LaunchError(f"{self.launch.op}: got shapes {dims}, a grid of {grid}; expected at most {MAX_GRID}")
        self._arguments.set_shapes(dims)
        self._grid, self.dims = grid, dims

    def queue(self, inputs: list[int], outputs: list[int], workspace: int, stream: int) -> None:
        if 0 in self._grid:
            return  # an empty tensor; CUDA refuses an empty grid
        self._arguments.set_addresses(inputs, outputs)
        at, shared = self._arguments.at, self.kernel.shared
        result = self._driver.cuLaunchKernel(self._function, *self._grid, self._threads, 1, 1, shared, stream, at, 0)
        if int(result[0]):
            _ok(result, f"{self.launch.op}: cuLaunchKernel, grid {self._grid}, {self._threads} threads, {shared} bytes shared")


class ProductWork:
    """A node's matrix product through cuBLASLt. dims: that it is prepared for."""

    workspace = cublas_lt.WORKSPACE

    def __init__(self, launch: Launch, product: Product) -> None:
        """Raises cublas_lt.CublasError if it is not installed."""
        from cuda.bindings import driver

        context = _ok(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
        self.launch, self._op, self._sizes, self._empty = launch, launch.op, product, True
        self.dims: list[tuple[int, ...]] = []
        self._scaled = launch.inputs[0] == "int8"
        self._biased = len(launch.inputs) == (5 if self._scaled else 3)
        dtype = "fp8" if self._scaled else launch.inputs[0]
        self._product = cublas_lt.Product(dtype, bias=self._biased, context_id=_ok(driver.cuCtxGetId(context), "cuCtxGetId"))

    def prepare(self, dims: list[tuple[int, ...]]) -> None:
        rows, columns, depth = (evaluate(size, dims) for size in (self._sizes.rows, self._sizes.columns, self._sizes.depth))
        scales = [dims[0][:-1], (columns,)] if self._scaled else []
        expected = [(*dims[0][:-1], depth), (columns, depth), *scales, *([(columns,)] if self._biased else [])]
        if dims != expected:
            raise LaunchError(f"{self._op}: got shapes {dims}; expected {expected}")
        self._empty, self.dims = 0 in (rows, columns, depth), dims
        if not self._empty:
            self._product.prepare(rows, columns, depth)

    def queue(self, inputs: list[int], outputs: list[int], workspace: int, stream: int) -> None:
        x, weight, *rest = inputs
        if any(address % ALIGNMENT for address in (*inputs, *outputs)):
            raise LaunchError(f"{self._op}: got {[*map(hex, (*inputs, *outputs))]}; expected multiples of {ALIGNMENT} bytes")
        if self._empty:
            return
        x_scale, w_scale = rest[:2] if self._scaled else (0, 0)
        bias = rest[-1] if self._biased else 0
        self._product.run(x, weight, bias, outputs[0], workspace, stream, x_scale=x_scale, w_scale=w_scale)
