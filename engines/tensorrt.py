"""TensorRT engines: build one from an ONNX file, load one, say what is in it.

No GPU is needed to build, except for an architecture that TensorRT does not compile ahead of time. Importing this module imports
nothing heavy; load(), or any function that needs it, imports TensorRT.
"""

from __future__ import annotations

import io
import json
import mmap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from engines.errors import ArchitectureError, BuildError, PluginMissingError, TensorRTVersionError
from engines.gpu import DeviceInfo, current_target, device_info
from engines.spec import AHEAD_OF_TIME_TARGETS, Target
from engines.tensorrt_library import check_parser, flavor, load, logger, version, why

__all__ = [
    "BuildReport",
    "DeviceInfo",
    "Profiles",
    "TensorInfo",
    "build_engine",
    "build_engine_file",
    "current_target",
    "deserialize",
    "device_info",
    "engine_layers",
    "engine_tensors",
    "flavor",
    "load",
    "version",
]

Shape = Sequence[int]
Profiles = Mapping[str, tuple[Shape, Shape, Shape]]  # input name: min, opt and max shape
RegisterPlugins = Callable[[ModuleType], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What a build took. peak_bytes is the process's high-water mark, mapped weights included.

    memory: bytes on the GPU that TensorRT says the engine needs, of several architectures the most: "Weights"; "Activation", at the
    profile's largest shapes; "Device Persistent".
    """

    engine_bytes: int
    seconds: float
    peak_bytes: int
    layers: int
    plugins: dict[str, int]
    memory: dict[str, int]


def build_engine_file(
    onnx_path: Path,
    engine: BinaryIO,
    *,
    profiles: Profiles,
    targets: Sequence[Target],
    expected_plugins: Mapping[str, int],
    register_plugins: RegisterPlugins | None = None,
    log: Callable[[str], object] | None = None,
    aux_streams: int | None = None,
) -> BuildReport:
    """Compile an ONNX file into one engine for all `targets`, written to `engine` as it is made.

    The network is strongly typed: every tensor has the type that the graph gives it. TF32 is off: fp32 means fp32. Weights are
    mapped from the external data file and the engine is streamed: memory holds one copy of the weights, and pages of that file.

    profiles: shapes of every input with a dynamic dimension. targets: architectures that TensorRT compiles ahead of time, or the
    one in this machine. expected_plugins: how many plugin layers each op must become. register_plugins: called with the TensorRT
    module before parsing. log: called with TensorRT's warnings and errors. aux_streams: on how many streams beside the first layers
    may run; None: as TensorRT sees fit.
    Raises PluginMissingError if the plugin layers are not those expected, BuildError for everything that TensorRT refuses, and
    OSError as `engine` raises it, such as for a full disk.
    """
    trt, logs, start = load(), logger(), time.monotonic()
    check_parser()
    logs.clear()
    logs.listener = log
    logs.memory = {}
    try:
        if register_plugins is not None:
            register_plugins(trt)
        builder = trt.Builder(logs)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logs)  # must outlive the network, whose weights it maps
        _parse(parser, onnx_path)
        plugins = _check_plugins(trt, network, onnx_path, expected_plugins)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        if aux_streams is not None:
            config.max_aux_streams = aux_streams
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # engine_layers() then names every layer
        _set_targets(trt, config, targets)
        _set_profile(builder, config, network, profiles)
        writer = _writer(trt, engine)
        if not builder.build_serialized_network_to_stream(network, config, writer):
            if writer.failure is not None:
                raise writer.failure
            raise BuildError(f"{onnx_path}: got no engine for {', '.join(targets)}; expected one.{why()}")
        if writer.failure is not None:
            raise writer.failure
        return BuildReport(
            engine_bytes=writer.written,
            seconds=time.monotonic() - start,
            peak_bytes=_peak_bytes(),
            layers=network.num_layers,
            plugins=plugins,
            memory=dict(logs.memory),
        )
    finally:
        logs.listener = None


def build_engine(
    onnx_path: Path,
    *,
    profiles: Profiles,
    targets: Sequence[Target],
    expected_plugins: Mapping[str, int],
    register_plugins: RegisterPlugins | None = None,
    log: Callable[[str], object] | None = None,
) -> bytes:
    """build_engine_file() into memory: for engines that are small."""
    engine = io.BytesIO()
    build_engine_file(
        onnx_path,
        engine,
        profiles=profiles,
        targets=targets,
        expected_plugins=expected_plugins,
        register_plugins=register_plugins,
        log=log,
    )
    return engine.getvalue()


def _parse(parser: Any, onnx_path: Path) -> None:
    if not onnx_path.is_file():
        raise BuildError(f"got no file {onnx_path}; expected an ONNX model")
    if parser.parse_from_file(str(onnx_path)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = "\n  ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors)
    raise BuildError(f"{onnx_path}: got a model that TensorRT's ONNX parser refuses:\n  {lines or why()}")


def _check_plugins(trt: Any, network: Any, onnx_path: Path, expected: Mapping[str, int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer  # TensorRT's own way to reach a layer's fields
            found[str(layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name)] += 1
    wanted = {op: count for op, count in expected.items() if count}
    if dict(found) != wanted:
        raise PluginMissingError(
            f"{onnx_path}: got the plugin layers {_counts(found)}; expected {_counts(wanted)}. A node becomes a plugin only if its "
            'op was registered and it has the attributes plugin_version="1" and plugin_namespace=""; else its body is inlined.'
        )
    return dict(found)


def _counts(plugins: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in sorted(plugins.items())) or "none"


def _set_targets(trt: Any, config: Any, targets: Sequence[Target]) -> None:
    if not targets:
        raise BuildError("targets: got none; expected at least one GPU architecture")
    rtx, here = flavor() == "rtx", current_target()
    ahead = rtx and all(target in AHEAD_OF_TIME_TARGETS for target in targets)
    if not ahead and tuple(targets) != (here,):
        raise BuildError(
            f"targets: got {', '.join(targets)}; expected some of {', '.join(AHEAD_OF_TIME_TARGETS) if rtx else 'none'}, which "
            f"TensorRT {version()} compiles ahead of time, or the GPU in this machine alone ({here or 'there is none'}). "
            "Build on that GPU with the target 'current'."
        )
    if not rtx:
        return
    names = [target.upper() for target in targets] if ahead else ["CURRENT"]
    capabilities = [getattr(trt.ComputeCapability, name) for name in names]
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(capability, index):
            raise BuildError(f"targets: got {', '.join(targets)}; TensorRT {version()} refuses {capability}.{why()}")


def _set_profile(builder: Any, config: Any, network: Any, profiles: Profiles) -> None:
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    dynamic = {name for name, shape in inputs.items() if -1 in shape}
    if unknown := set(profiles) - set(inputs):
        raise BuildError(f"profiles: got {', '.join(sorted(unknown))}; expected some of the inputs {', '.join(inputs)}")
    if missing := dynamic - set(profiles):
        raise BuildError(f"profiles: got none for the dynamic inputs {', '.join(sorted(missing))}; expected one for each")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name in sorted(profiles):
        shape, (lowest, optimal, highest) = inputs[name], profiles[name]
        fits = len(shape) == len(lowest) == len(optimal) == len(highest) and all(
            0 <= a <= b <= c and (size == -1 or a == b == c == size)
            for size, a, b, c in zip(shape, lowest, optimal, highest, strict=True)
        )
        if not fits:
            raise BuildError(
                f"profiles, input {name!r}: got {tuple(lowest)}, {tuple(optimal)}, {tuple(highest)}; expected min <= opt <= max, "
                f"each a shape of the model's {shape}, where -1 is free"
            )
        profile.set_shape(name, tuple(lowest), tuple(optimal), tuple(highest))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"profiles: got {dict(profiles)}, which TensorRT refuses.{why()}")


def _writer(trt: Any, sink: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Passes on what it is given. An OSError cannot travel through TensorRT, so it waits in `failure`."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.failure: OSError | None = None

        def write(self, data: Any) -> int:
            if self.failure is not None:
                return 0
            try:
                sink.write(data)
            except OSError as error:
                self.failure = error
                return 0
            self.written += len(data)
            return len(data)

    return Writer()


def _peak_bytes() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def deserialize(engine: bytes | Path, *, register_plugins: RegisterPlugins | None = None) -> Any:
    """Load an engine onto the GPU: TensorRT's ICudaEngine. A path is mapped, not read into memory.

    register_plugins: called with the TensorRT module first; needed if the engine holds plugins.
    Raises BuildError if the bytes are no engine, NoGpuError without a GPU, TensorRTVersionError or ArchitectureError if it was
    built for another TensorRT or GPU, PluginMissingError if a plugin of it is not registered.
    """
    trt = load()
    if isinstance(engine, Path):
        if not engine.stat().st_size:
            raise BuildError(f"{engine}: got an empty file; expected an engine. Build it again")
        with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _deserialize(trt, mapped, str(engine), register_plugins)
    return _deserialize(trt, engine, f"engine of {len(engine)} bytes", register_plugins)


def _deserialize(trt: Any, data: Any, name: str, register_plugins: RegisterPlugins | None) -> Any:
    logger().clear()
    runtime = trt.Runtime(logger())
    diagnosis = trt.EngineInvalidityDiagnostics
    _, flags = runtime.get_engine_validity(data)
    if flags & int(diagnosis.MALFORMED_ENGINE):
        raise BuildError(f"{name}: got bytes that are no engine of TensorRT {version()}, or are damaged. Build it again")
    device = device_info()
    if register_plugins is not None:
        register_plugins(trt)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is not None:
        return engine
    # TensorRT's diagnosis explains a refusal; it isn't asked for permission, since it also frowns at engines that run.
    built_by = _built_by(data)
    if flags & int(diagnosis.VERSION_MISMATCH) or built_by not in ("", version()):
        raise TensorRTVersionError(
            f"{name}: got an engine of TensorRT {built_by or 'of another version'}; expected {flavor()} {version()}, which is "
            "installed. Build it again with this version, or install the one that built it."
        )
    if flags & int(diagnosis.UNSUPPORTED_CC):
        raise ArchitectureError(
            f"{name}: got {device.name} ({device.sm}), for which this engine has no code. Build it for {device.sm}."
        )
    if "plugin" in why().lower():
        raise PluginMissingError(f"{name}: got an engine with a plugin that is not registered, or that cannot load.{why()}")
    reasons = ", ".join(member for member, flag in diagnosis.__members__.items() if flags & int(flag)) or "none given"
    raise BuildError(f"{name}: got an engine that TensorRT {version()} cannot load on {device.name} ({reasons}).{why()}")


def _built_by(data: Any) -> str:
    """The TensorRT version in an engine's header, for messages: NVIDIA does not document where it stands. Empty if not found."""
    header = bytes(data[:28])
    return ".".join(map(str, header[24:28])) if header[:4] == b"vtrt" and len(header) == 28 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """An input or output of an engine. -1 is a free dimension; profile is an input's min, opt and max shape."""

    name: str
    is_input: bool
    dtype: str  # as numpy names it, and "bfloat16"
    shape: tuple[int, ...]
    profile: tuple[tuple[int, ...], ...]


def engine_tensors(engine: Any) -> list[TensorInfo]:
    """The inputs and outputs of a loaded engine, in its order."""
    trt = load()
    kinds = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        kind = engine.get_tensor_dtype(name).name
        tensors.append(
            TensorInfo(
                name=name,
                is_input=is_input,
                dtype=kinds.get(kind, kind.lower()),
                shape=tuple(engine.get_tensor_shape(name)),
                profile=tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0)) if is_input else (),
            )
        )
    return tensors


def engine_layers(engine: Any) -> list[dict[str, Any]]:
    """What TensorRT says of each layer of a loaded engine: its own JSON, whose fields differ between versions."""
    text = engine.create_engine_inspector().get_engine_information(load().LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]
