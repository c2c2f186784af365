"""One TensorRT plugin for every op: it launches what its node carries.

A node's `launch` attribute (plugins/launch.py) says how its `cubins` are launched, so a new op needs a name here and no code. The
plugin is TensorRT's IPluginV3, in Python; it needs numpy and cuda-bindings, never Triton or PyTorch.

A node is a kernel of its own (`cubins`), or a product that cuBLASLt computes; plugins/work.py runs either.

When which part runs:
    build     the ONNX parser makes the plugin from the node; shapes and types come from the description; both attributes go into
              the engine. No GPU is needed.
    load      TensorRT makes the plugin again from the engine; attach_to_context loads the cubin for the GPU that is there.
    execute   on_shape_change fills in grid and scalars; enqueue writes addresses and launches. Neither allocates, waits or loads
              anything, so that execution can be captured into a CUDA graph.

TensorRT prints an exception in a callback to stderr and answers with a bare failure, so each is also kept in `failures`.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from plugins.launch import Expression, Launch, LaunchError
from plugins.native import load_native
from plugins.work import KernelWork, ProductWork

__all__ = ["FIELDS", "OPS", "failures", "register"]

OPS = (
    "CausalAttention",
    "Conv3x3",
    "Conv3x3Norm",
    "Conv3x3Upsample",
    "CrossAttention",
    "Fp8Conv3x3",
    "Fp8Conv3x3Norm",
    "Fp8GatedSum",
    "Fp8Linear",
    "Fp8Quantize",
    "Fp8StaticQuantize",
    "GatedDepthwiseConv",
    "GatedModulatedNorm",
    "Int8Conv3x3",
    "Int8Conv3x3Norm",
    "Int8StaticQuantize",
    "Linear",
    "LinearAttentionApply",
    "LinearAttentionState",
    "ModulatedNorm",
    "MultiscaleProjection",
    "NormedSum",
    "NormedTaps",
    "ReluLinearAttention",
    "RotateHeads",
    "TapSum",
)
FIELDS = ("launch", "cubins")
NOTHING = b"\0"  # the cubins of a node without kernels: TensorRT drops an empty field
VERSION, NAMESPACE = "1", ""

failures: deque[Exception] = deque(maxlen=16)  # the latest exceptions of plugins, newest last; TensorRT's own errors don't say why

_creators: dict[tuple[str, str], Any] = {}  # TensorRT keeps no reference to a Python creator, so this does


P = ParamSpec("P")
R = TypeVar("R")


def _keeps_failures(callback: Callable[P, R]) -> Callable[P, R]:
    """What a callback raises goes into `failures` and to the log before TensorRT swallows it."""

    @functools.wraps(callback)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return callback(*args, **kwargs)
        except Exception as error:
            failures.append(error)
            logging.getLogger(__name__).error("%s", error)
            raise

    return call


def _tensorrt_types(trt: Any) -> dict[str, Any]:
    kind = trt.DataType
    types = {"fp32": kind.FLOAT, "fp16": kind.HALF, "bf16": kind.BF16, "fp8": kind.FP8, "int32": kind.INT32, "int64": kind.INT64}
    return types | {"int8": kind.INT8, "uint8": kind.UINT8, "bool": kind.BOOL}


def _dimension(expression: Expression, inputs: Any, builder: Any, trt: Any) -> Any:
    """The expression as TensorRT's own, over dimensions that are not known yet."""
    if isinstance(expression, int):
        return builder.constant(expression)
    if expression[0] == "dim":
        return inputs[expression[1]][expression[2]]
    kind = trt.DimensionOperation
    operation = {
        "add": kind.SUM,
        "sub": kind.SUB,
        "mul": kind.PROD,
        "floordiv": kind.FLOOR_DIV,
        "ceildiv": kind.CEIL_DIV,
        "min": kind.MIN,
        "max": kind.MAX,
    }[expression[0]]
    left, right = (_dimension(part, inputs, builder, trt) for part in expression[1:])
    return builder.operation(operation, left, right)


@functools.cache
def _classes(trt: Any) -> tuple[Any, Any]:
    """(plugin class, creator class), which derive from the classes of the TensorRT module that is in use."""
    types = _tensorrt_types(trt)

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """One node: its description and cubins, and, once attached to an execution context, its kernel and arguments."""

        def __init__(self, launch: Launch, cubins: bytes) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = launch.op, NAMESPACE, VERSION
            self.num_outputs = len(launch.outputs)
            self._launch, self._cubins = launch, cubins
            self._work: KernelWork | ProductWork | None = None
            self._dims: list[tuple[int, ...]] = []  # that the work is prepared for
            self._fields: tuple[Any, ...] = ()

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = Plugin(self._launch, self._cubins)
            if self._work is not None:
                copy._attach()
            return copy

        def _attach(self) -> None:
            product = self._launch.product
            self._work = KernelWork(self._launch, self._cubins) if product is None else ProductWork(self._launch, product)

        # Build

        @_keeps_failures
        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return [types[output.type] for output in self._launch.outputs]

        @_keeps_failures
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            return [trt.DimsExprs([_dimension(e, inputs, builder, trt) for e in output.shape]) for output in self._launch.outputs]

        @_keeps_failures
        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            if num_inputs != len(self._launch.inputs):
                raise LaunchError(f"{self._launch.op}: got {num_inputs} inputs; expected {len(self._launch.inputs)}")
            wanted = (*self._launch.inputs, *(output.type for output in self._launch.outputs))[pos]
            return bool(in_out[pos].desc.type == types[wanted] and in_out[pos].desc.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return KernelWork.workspace if self._launch.product is None else ProductWork.workspace

        def get_fields_to_serialize(self) -> Any:
            # TensorRT reads the arrays after this returns, so they live as long as the plugin.
            self._fields = tuple(np.frombuffer(data, np.int8) for data in (self._launch.to_json(), self._cubins or NOTHING))
            kind = trt.PluginFieldType.CHAR
            return trt.PluginFieldCollection([trt.PluginField(n, d, kind) for n, d in zip(FIELDS, self._fields, strict=True)])

        # Run

        @_keeps_failures
        def attach_to_context(self, context: Any) -> Any:
            attached = self.clone()
            attached._attach()
            return attached

        def set_tactic(self, tactic: int) -> None:
            pass

        @_keeps_failures
        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            if self._work is not None:
                self._prepare(self._work, [tuple(desc.dims) for desc in inputs])

        def _prepare(self, work: KernelWork | ProductWork, dims: list[tuple[int, ...]]) -> None:
            if dims != self._dims:
                self._dims = []
                work.prepare(dims)
                self._dims = dims

        @_keeps_failures
        def enqueue(self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int) -> None:
            if self._work is None:
                raise LaunchError(f"{self._launch.op}: enqueued without a kernel; expected attach_to_context before")
            # on_shape_change should have been told of the shapes; a wrong grid would write beyond the tensors
            self._prepare(self._work, [tuple(desc.dims) for desc in input_desc])
            self._work.queue(inputs, outputs, workspace, stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op, NAMESPACE, VERSION
            empty = np.array([], np.int8)
            kind = trt.PluginFieldType.CHAR
            self.field_names = trt.PluginFieldCollection([trt.PluginField(field, empty, kind) for field in FIELDS])

        @_keeps_failures
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            data = {field.name: np.asarray(field.data).tobytes() for field in fields}
            if missing := [field for field in FIELDS if not data.get(field)]:
                raise LaunchError(f"{self.name}, node {name!r}: got no attribute {missing[0]!r}; expected {' and '.join(FIELDS)}")
            # The ONNX parser appends a zero byte to a string attribute.
            launch = Launch.from_json(data["launch"].rstrip(b"\0"))
            if launch.op != self.name:
                raise LaunchError(f"{self.name}, node {name!r}: got the launch description of {launch.op!r}")
            return Plugin(launch, data["cubins"][: max((k.offset + k.size for k in launch.kernels.values()), default=0)])

    return Plugin, Creator


def register(trt: ModuleType, ops: Iterable[str] = OPS) -> None:
    """Tell TensorRT (the module `tensorrt` or `tensorrt_rtx`) about the plugins of these ops, once a process however often called.

    Needed before an ONNX file with such nodes is parsed and before an engine with such plugins is loaded. Uses the shell in C++
    (plugins/native.py) where it is installed.
    Raises RuntimeError if another plugin of that name and version is registered already, or for a library that cannot be loaded.
    """
    native = OPS if load_native(trt) else ()
    for op in ops:
        if op in native:
            continue
        if (trt.__name__, op) in _creators:
            continue
        creator = _classes(trt)[1](op)
        if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
            raise RuntimeError(f"TensorRT plugin {op!r}: got its name, version {VERSION}, from another library; expected it unused")
        _creators[trt.__name__, op] = creator
