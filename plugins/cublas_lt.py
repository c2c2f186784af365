"""Matrix products through cuBLASLt, NVIDIA's library, for GPUs whose tensor cores neither Triton nor TensorRT for RTX reaches.

On compute capability 9.0 TensorRT for RTX has no kernels for Hopper's tensor cores. Measured on an H200, fp16 with fp32 sums, 2048
tokens of Sana-1.6B (columns x depth 11200 x 2240): TensorRT for RTX 1.6.1 0.415 ms, Triton 3.6 0.188, cuBLASLt 13 0.148.

The library is looked for when an engine first needs it: the one that is loaded or on the search path, or the package
nvidia-cublas. Sums are fp32. The algorithm is the heuristic's first answer that runs, never a measured one, so that the same
library on the same GPU gives the same bits. For FP8 with a scale a row the heuristic knows one size of blocks; where these leave
much of a wave of multiprocessors empty, the algorithm is what it answers for one scale a matrix, if that runs with a scale a row.
Needs the standard library only. Numbers: cublasLt.h of CUDA 13.
"""

import ctypes
import functools
import importlib.util
import math
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

__all__ = ["WORKSPACE", "CublasError", "Product", "paths"]

_WORKSPACE_ALIGNMENT = 256  # bytes; from other addresses cuBLASLt takes no workspace (CUBLAS_STATUS_INVALID_VALUE)
_USABLE = 32 << 20  # bytes; what NVIDIA recommends for compute capability 9.0
WORKSPACE = _USABLE + _WORKSPACE_ALIGNMENT
CANDIDATES = 8  # algorithms that the heuristic is asked for: one that it names may still be refused when it runs
ALIGNMENT = 16  # bytes, of every tensor
VERSIONS = (13, 12)
TYPES = {"fp32": 0, "fp16": 2, "bf16": 14, "fp8": 28}  # cudaDataType; fp8 is e4m3
_COMPUTE_32F, _SCALE_32F = 68, 0
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # attributes of a product
_TRANSPOSED, _WITH_BIAS = 1, 4
_SCALE_POINTERS, _SCALE_MODES = (17, 18), (31, 32)  # of A, of B
A_NUMBER, A_NUMBER_A_ROW = 0, 3  # modes
# Of its waves. Measured on an H200 with 2048 rows (benchmarks/product_plans.py): below, the heuristic's own takes 1.2 to 1.5 times
# as long as the first of the others; above, the others are slower by up to 13 %.
WELL_FILLED = 0.8
_FAST_ACCUMULATION = 25  # fp8: sums keep fewer bits than fp32 has between two promotions, as PyTorch's default for inference does
_REFUSALS = (7, 15)  # CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED: nothing was queued
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # preferences


class CublasError(RuntimeError):
    """cuBLASLt is not installed, or refused a call."""


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def _filled(algorithm: _Heuristic) -> float:
    """How much of its waves of multiprocessors an algorithm fills; 1 where cuBLASLt does not say."""
    return algorithm.waves / math.ceil(algorithm.waves) if algorithm.waves > 0 else 1.0


def paths() -> list[str]:
    """Where the library may be, in the order of trying."""
    found = []
    for version in VERSIONS:
        name = f"libcublasLt.so.{version}"
        found.append(name)
        for package in (f"nvidia.cu{version}", "nvidia.cublas"):
            try:
                spec = importlib.util.find_spec(package)
            except ModuleNotFoundError:  # there is no package `nvidia` at all
                continue
            found += [str(Path(folder) / "lib" / name) for folder in (spec.submodule_search_locations or ())] if spec else []
    return found


@functools.cache
def _library() -> Any:
    """Raises CublasError if there is none."""
    tried = []
    for path in paths():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(str(error))
    raise CublasError(
        f"got no cuBLASLt ({'; '.join(tried)}); expected CUDA's, which engines for this GPU run their matrix products with. "
        "Install it: pip install 'sana-deploy[hopper]', or 'nvidia-cublas>=13,<14'"
    )


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise CublasError(f"{name}: got status {status} (CUBLAS_STATUS_…, cublas_api.h); expected 0")


@functools.cache
def _handle(context_id: int) -> c_void_p:
    """One for each CUDA context, which must be the current one; never destroyed."""
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


class Product:
    """out = x w^T (+ bias) in one call: x (rows, depth), w (columns, depth), bias (columns,), out (rows, columns), all of one type.

    fp8: x and w alone; out and bias are fp16, and out is multiplied by x_scale (rows,) and w_scale (columns,), fp32.
    For one thread at a time. prepare() before run(); run() neither allocates nor waits, so that a CUDA graph can capture it.
    """

    def __init__(self, dtype: str, *, bias: bool, context_id: int) -> None:
        """dtype: one of TYPES. context_id: of the current CUDA context. Raises CublasError without the library."""
        self._type, self._lt, self._scaled = TYPES[dtype], _handle(context_id), dtype == "fp8"
        self._out_type = TYPES["fp16"] if self._scaled else self._type
        self._run = _library().cublasLtMatmul
        self._alpha, self._beta = c_float(1.0), c_float(0.0)
        self._description = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self._description), _COMPUTE_32F, _SCALE_32F)
        # Column by column, as cuBLAS sees memory: out^T (columns, rows) = w, transposed, times x^T.
        self._describe(_TRANSPOSE_A, c_int32(_TRANSPOSED))
        if bias:
            self._describe(_EPILOGUE, c_int32(_WITH_BIAS))
        if self._scaled:
            self.scale_by(A_NUMBER_A_ROW)
            self._describe(_FAST_ACCUMULATION, c_int8(1))
        self._bias = bias
        self._layouts: list[c_void_p] = []
        self.candidates: list[_Heuristic] = []  # best first
        self._size = (0, 0, 0)

    def _describe(self, attribute: int, value: Any) -> None:
        _call("cublasLtMatmulDescSetAttribute", self._description, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def scale_by(self, mode: int) -> None:
        """fp8: x and w have A_NUMBER each, or A_NUMBER_A_ROW, as they have unless this says otherwise."""
        for attribute in _SCALE_MODES:
            self._describe(attribute, c_int32(mode))

    def prepare(self, rows: int, columns: int, depth: int) -> None:
        """Choose the algorithm for this size. Raises CublasError if there is none."""
        self._free_layouts()
        sizes = ((self._type, depth, columns), (self._type, depth, rows), (self._out_type, columns, rows))
        for kind, height, width in sizes:
            layout = c_void_p()
            _call("cublasLtMatrixLayoutCreate", byref(layout), kind, c_uint64(height), c_uint64(width), c_int64(height))
            self._layouts.append(layout)
        self._size, self.candidates = (rows, columns, depth), self.named(CANDIDATES)
        if self._scaled and self.candidates and _filled(self.candidates[0]) < WELL_FILLED:
            self.scale_by(A_NUMBER)
            try:
                others = self.named(CANDIDATES)
            finally:
                self.scale_by(A_NUMBER_A_ROW)
            own = _filled(self.candidates[0])
            accepted = (each for each in map(self.checked, others) if each is not None)
            self.candidates = [each for each in accepted if _filled(each) > own] + self.candidates
        if not self.candidates:
            raise CublasError(f"got no algorithm for {rows} x {columns} x {depth}; expected one")

    def named(self, most: int) -> list[_Heuristic]:
        """What the heuristic answers for the size that was prepared, best first."""
        w, x, out = self._layouts
        preference, found, answers = c_void_p(), c_int(), (_Heuristic * most)()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            for attribute, value in (
                (_MAX_WORKSPACE, c_uint64(_USABLE)),
                *((each, ctypes.c_uint32(ALIGNMENT)) for each in _ALIGNMENTS),
            ):
                _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, byref(value), c_size_t(ctypes.sizeof(value)))
            # Any: that there are some decides which algorithms fit.
            self._point(ALIGNMENT, (ALIGNMENT, ALIGNMENT))
            _call(
                "cublasLtMatmulAlgoGetHeuristic", self._lt, self._description, w, x, out, out, preference,
                most, answers, byref(found),
            )  # fmt: skip
        finally:
            _call("cublasLtMatmulPreferenceDestroy", preference)
        return [each for each in answers[: found.value] if not each.state]

    def checked(self, algorithm: _Heuristic) -> _Heuristic | None:
        """The algorithm as it would run for this description; None if it would not."""
        w, x, out = self._layouts
        found = _Heuristic()
        status = _library().cublasLtMatmulAlgoCheck(self._lt, self._description, w, x, out, out, byref(algorithm), byref(found))
        found.algo = algorithm.algo
        return None if status or found.state or found.workspace > _USABLE else found

    def _point(self, bias: int, scales: tuple[int, int]) -> None:
        """scales: of w and of x."""
        if self._bias:
            self._describe(_BIAS_POINTER, c_void_p(bias))
        if self._scaled:
            for attribute, scale in zip(_SCALE_POINTERS, scales, strict=True):
                self._describe(attribute, c_void_p(scale))

    def run(self, x: int, w: int, bias: int, out: int, workspace: int, stream: int, *, x_scale: int = 0, w_scale: int = 0) -> None:
        """Queue the product. Device addresses, multiples of ALIGNMENT; workspace: WORKSPACE bytes, or 0 for none; bias: 0 if there
        is none. Raises CublasError if no algorithm runs."""
        self._point(bias, (w_scale, x_scale))
        w_layout, x_layout, out_layout = self._layouts
        while True:
            if not workspace:
                self.candidates = [each for each in self.candidates if not each.workspace]
            if not self.candidates:
                raise CublasError(f"got no algorithm for {self._size} without a workspace; expected one")
            algorithm = self.candidates[0]
            # TensorRT aligns a workspace to less than cuBLASLt accepts, even where the algorithm needs none.
            given = -(-workspace // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT if algorithm.workspace else 0
            status = self._run(
                self._lt, self._description, byref(self._alpha), c_void_p(w), w_layout, c_void_p(x), x_layout, byref(self._beta),
                c_void_p(out), out_layout, c_void_p(out), out_layout, byref(algorithm), c_void_p(given),
                c_size_t(_USABLE if given else 0), c_void_p(stream),
            )  # fmt: skip
            if not status:
                return
            if status not in _REFUSALS or len(self.candidates) == 1:
                raise CublasError(
                    f"cublasLtMatmul: got status {status} (CUBLAS_STATUS_…, cublas_api.h) for {self._size}, x {x:#x}, w {w:#x}, "
                    f"bias {bias:#x}, out {out:#x}, workspace {given:#x}, of which the algorithm needs {algorithm.workspace} "
                    "bytes; expected 0"
                )
            del self.candidates[0]  # for this size it is out

    def _free_layouts(self) -> None:
        while self._layouts:
            _call("cublasLtMatrixLayoutDestroy", self._layouts.pop())

    def close(self) -> None:
        self._free_layouts()
        if self._description:
            _call("cublasLtMatmulDescDestroy", self._description)
            self._description = c_void_p()
