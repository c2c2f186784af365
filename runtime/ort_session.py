"""The portable graphs in ONNX Runtime, on any machine's CPU."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.errors import BundleError, SanaError
from runtime.session import Arrays
from runtime.together import default_threads
from runtime.token_table import TokenTable

__all__ = ["OrtSession", "cpu_name", "exact_products"]

CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def _adds_in_32_bits() -> bool:
    """Whether this CPU adds products of int8 in 32 bits: one that is not x86, or has VNNI. Where nothing says so it is not said."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86", "i386", "i686"):
        return True
    try:
        return (
            re.search(r"^flags\b.*\bavx(512)?_vnni\b", CPU_INFO.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
            is not None
        )
    except OSError:
        return False


def exact_products(options: Any) -> None:
    """Have sessions with these options multiply quantized numbers right on any CPU.

    x86 without VNNI adds two products of int8 in 16 bits, which cut the sum off (ONNX Runtime, docs/performance/quantization, "U8S8
    Data Type"). There products are computed in fp32, slower.
    """
    if not _adds_in_32_bits():
        options.add_session_config_entry("session.disable_quant_qdq", "1")


class OrtSession:
    """One component.

    num_threads: for one operator. release_memory: give the working memory back after each run, for components that run once a
    picture and would otherwise hold it while others work. table: of tokens, whose rows the graph takes in place of ids.
    """

    def __init__(
        self, path: Path, *, num_threads: int | None = None, release_memory: bool = False, table: TokenTable | None = None
    ) -> None:
        """Raises BundleError for a graph that ONNX Runtime does not take."""
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or default_threads()  # a count of our own also keeps threads unpinned
        options.inter_op_num_threads = 1
        # Threads that spin between operators take the cores from others: on a busy machine two were slower than one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        exact_products(options)
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        options.log_severity_level = 3  # errors; warnings are about graph clean-up
        self._path, self._table = path, table
        self._run_options = onnxruntime.RunOptions()
        if release_memory:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._errors = (state.Fail, state.InvalidArgument, state.RuntimeException, state.EPFail)
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (*self._errors, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented, state.NoSuchFile) as error:
            raise BundleError(f"{path}: ONNX Runtime {onnxruntime.__version__} does not take it ({error}). Rebuild.") from None
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.outputs = tuple(each.name for each in self._session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Inputs that the graph does not have are left out. Raises SanaError for one that is missing, and when the run fails."""
        if self._table is not None:
            inputs = self._table.looked_up(inputs)
        if missing := [name for name in self.inputs if name not in inputs]:
            raise SanaError(f"{self._path}: the graph wants {', '.join(missing)}; got {', '.join(inputs)}. Rebuild the bundle.")
        try:
            values = self._session.run(self.outputs, {name: inputs[name] for name in self.inputs}, self._run_options)
        except self._errors as error:
            shapes = {name: inputs[name].shape for name in self.inputs}
            raise SanaError(f"{self._path}: ONNX Runtime failed ({error}); got {shapes}.") from None
        return dict(zip(self.outputs, values, strict=True))

    def close(self) -> None:
        self._session = self._table = None


def cpu_name() -> str:
    """This machine's processor in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU, {model or platform.processor() or platform.machine()}"
