"""Time of each kernel of a component, beside the least that its arithmetic and its traffic could take.

- In ONNX Runtime: its own profile, which knows every node's shapes, so FLOPs and bytes are known.
- In TensorRT, on a second context of the same engine, so that the first stays as fast as it is, of two the one that knows FLOPs of
  more of the time:
  - CUPTI, through torch.profiler: all kernels. FLOPs and bytes are known of plugins' (plugin_costs.py).
  - TensorRT's own profiler (IProfiler), with shapes from the engine inspector. FLOPs are known of layers with weights of their own.
    The GPU is kept waiting until all layers are queued: else each one's time has the host's launch of the next in it, five times a
    step's of Sana-1.6B in all.

What the machine can do is measured in the same run: the rate of the fastest of a few GEMMs, and of a copy.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.latency_history import NARROW, Kernel, Kernels
from benchmarks.latency_work import Arrays, Work, graph_inputs
from benchmarks.latency_yardstick import CPU_GEMM, GPU_GEMM, copy_rate, gemm_rate
from benchmarks.plugin_costs import attributed, launches
from engines.spec import ComponentName
from runtime.ort_session import exact_products
from runtime.token_table import TokenTable

if TYPE_CHECKING:
    from runtime import SanaEngine

__all__ = ["Profiler", "layer_cost", "node_cost", "ort_kernels", "trt_kernels"]

MOST = 40  # kernels in a record
NO_KERNELS = "not there: TensorRT's profiler said nothing, and PyTorch sees no GPU"
GPU_GEMMS = (GPU_GEMM, (8192, 8192, 8192))
CPU_GEMMS = (CPU_GEMM, (256, 256, 256), (256, 1024, 256))  # those whose operands stay in a cache are faster
RUNS = 5
CYCLES_PER_S = 2_000_000_000  # of a GPU, about
MATRIX_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
CONVOLUTIONS = ("Conv", "FusedConv")
ITEM_BYTES = {"int64": 8, "double": 8, "float": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "uint8": 1, "int8": 1}


class Profiler:
    """What Bench.kernels calls."""

    def __init__(self, *, gpu: bool, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self.peak_flops = max(gemm_rate(size, gpu=gpu, num_threads=num_threads) for size in (GPU_GEMMS if gpu else CPU_GEMMS))
        self.peak_bytes = copy_rate(gpu=gpu)

    def __call__(self, engine: SanaEngine, work: Work) -> Kernels | None:
        """None for a picture, which is more than one component."""
        if work.component == "picture":
            return None
        inputs = graph_inputs(engine, work)
        if engine.backend == "onnxruntime":
            table = TokenTable.of(engine.bundle) if work.component == "text_encoder" else None
            given = inputs if table is None else table.looked_up(inputs)
            found = ort_kernels(engine.bundle.onnx_path(cast(ComponentName, work.component)), given, num_threads=self.num_threads)
            why = "nodes, by ONNX Runtime's profiler"
        else:
            with engine.session(work.component) as session:
                found, why = trt_kernels(session, inputs)
        found = sorted(found, key=lambda kernel: -kernel.ms)
        total = sum(kernel.ms for kernel in found)
        shown = found[:MOST]
        if found:
            share = sum(kernel.ms for kernel in shown) / total if total else 1.0
            why += f"; the {len(shown)} slowest of {len(found)}, which take {share:.0%} of {total:.3f} ms"
        peaks = {"peak_flops": self.peak_flops, "peak_narrow_flops": _narrow_peak(shown), "peak_bytes": self.peak_bytes}
        return Kernels(why=why, **peaks, kernels=tuple(shown))


def _narrow_peak(kernels: Sequence[Kernel]) -> float:
    narrow = next((kernel.kind for kernel in kernels if kernel.flops and kernel.kind.startswith(NARROW)), None)
    if narrow is None:
        return 0.0
    from benchmarks.latency_floor import narrow_rate

    return narrow_rate("fp8" if narrow.startswith("Fp8") else "int8")


def node_cost(kind: str, inputs: Sequence[tuple[str, list[int]]], outputs: Sequence[tuple[str, list[int]]]) -> tuple[int, int]:
    """FLOPs and bytes of an ONNX Runtime node from (type, shape) of its inputs and outputs. Weights that ONNX Runtime packed for
    itself are not among the inputs; those of a matrix product follow from the shapes. Of other nodes FLOPs are not counted."""
    size = sum(math.prod(shape) * ITEM_BYTES.get(dtype, 4) for dtype, shape in (*inputs, *outputs))
    if not inputs or not outputs:
        return 0, size
    first, out = inputs[0][1], outputs[0][1]
    if kind in MATRIX_PRODUCTS and first and out:
        if len(inputs) == 1:
            size += first[-1] * out[-1] * ITEM_BYTES.get(inputs[0][0], 4)
        return 2 * math.prod(out) * first[-1], size
    if kind in CONVOLUTIONS and len(inputs) > 1 and len(inputs[1][1]) == 4:
        return 2 * math.prod(out) * math.prod(inputs[1][1][1:]), size
    return 0, size


def ort_kernels(path: Path, inputs: Arrays, *, runs: int = RUNS, num_threads: int = 1) -> list[Kernel]:
    """Medians over `runs`, after one for warm-up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as runtime.ort_session has it
    exact_products(options)
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {each.name: inputs[each.name] for each in session.get_inputs()}
        for _ in range(runs + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _kernels_of(events, runs)


def _kernels_of(events: Iterable[Mapping[str, Any]], runs: int) -> list[Kernel]:
    nodes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            nodes[f"{event['args'].get('node_index', '')} {event['name'].removesuffix('_kernel_time')}"].append(event)
    found = []
    for name, rows in nodes.items():
        args = rows[0]["args"]
        shapes = [[(dtype, shape) for each in args.get(key, []) for dtype, shape in each.items()] for key in SHAPES]
        flops, size = node_cost(args["op_name"], *shapes)
        ms = statistics.median(row["dur"] for row in rows[-runs:]) / 1000  # the profile has microseconds
        found.append(Kernel(name=name.partition(" ")[2][:300], kind=args["op_name"], ms=ms, flops=flops, bytes=size))
    return found


SHAPES = ("input_type_shape", "output_type_shape")


def trt_kernels(session: Any, inputs: Arrays, *, runs: int = RUNS) -> tuple[list[Kernel], str]:
    """Of a runtime.trt_session.TensorRTSession, and how they were measured: means over `runs`, after one for warm-up."""
    from runtime.cuda import Slot
    from runtime.trt_session import Arena

    library, cuda = session._tensorrt, session._cuda
    arena, inputs = Arena(cuda), session.looked_up(inputs)
    second = type(session)(session._path, tensorrt=library, cuda=cuda, arena=arena)
    slots: dict[str, Slot] = {name: Slot(cuda) for name in (*second.inputs, *second.outputs)}
    try:
        shapes = second.prepare({name: inputs[name].shape for name in second.inputs})
        addresses = {name: slots[name].write(second.device_array(name, inputs[name])) for name in second.inputs}
        addresses |= {name: slots[name].reserve(second.output_size(name, shape)) for name, shape in shapes.items()}

        def call() -> None:
            second.launch(addresses)
            cuda.synchronize()

        seen = _cupti(call, runs)
        times = _profiled(library.module, second._context, call, runs, cuda.stream)
        layers = _layers(library.module, second) if times else {}
        profiled = [_layer(name, ms, layers.get(name, {})) for name, ms in times.items()]
        if _known(seen) > _known(profiled) or not profiled:
            return seen, "kernels, by CUPTI through torch.profiler" if seen else NO_KERNELS
        return profiled, "layers, by TensorRT's profiler"
    finally:
        cuda.synchronize()
        for slot in slots.values():
            slot.close()
        second.close()
        arena.close()


def _profiled(trt: Any, context: Any, call: Callable[[], None], runs: int, stream: int) -> dict[str, float]:
    """Milliseconds by layer; empty if this TensorRT has no profiler, or it was told nothing."""
    if not hasattr(trt, "IProfiler"):
        return {}
    times: dict[str, float] = defaultdict(float)

    class Listener(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] += ms

    call()
    begin = time.perf_counter()
    call()
    longest = time.perf_counter() - begin
    listener = Listener()  # TensorRT keeps an address of it, not a reference
    context.profiler = listener
    for _ in range(runs):
        _hold(stream, 2 * longest)
        call()
    return {name: ms / runs for name, ms in times.items()}


def _hold(stream: int, seconds: float) -> None:
    """Keep a stream of this GPU waiting about so long. What is queued meanwhile runs without a pause then."""
    import torch

    if torch.cuda.is_available():
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.cuda._sleep(int(seconds * CYCLES_PER_S))  # a kernel that spins: the one way that PyTorch has


def _layers(trt: Any, session: Any) -> dict[str, Mapping[str, Any]]:
    """TensorRT's words about each layer, with the shapes of this context; their fields differ between versions."""
    inspector = session._engine.create_engine_inspector()
    inspector.execution_context = session._context
    rows = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)).get("Layers", [])
    return {row["Name"]: row for row in rows if isinstance(row, dict) and "Name" in row}


def _layer(name: str, ms: float, layer: Mapping[str, Any]) -> Kernel:
    flops, size = layer_cost(layer)
    return Kernel(name=name[:300], kind=str(layer.get("LayerType", "")), ms=ms, flops=flops, bytes=size)


def layer_cost(layer: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs and bytes from TensorRT's description. Each weight takes part once for every element of an output channel."""

    def shape(tensor: Mapping[str, Any]) -> list[int]:
        return [int(n) for n in tensor.get("Dimensions", []) if int(n) >= 0]

    def item(tensor: Mapping[str, Any]) -> int:
        words = str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).lower()
        return 2 if "half" in words or "16" in words else 1 if "8" in words else 4

    outputs = layer.get("Outputs") or []
    size = sum(math.prod(shape(t)) * item(t) for t in (*(layer.get("Inputs") or []), *outputs) if shape(t))
    weights = layer.get("Weights")
    weights = weights if isinstance(weights, dict) else {}
    count = int(weights.get("Count", 0))
    if not count or not outputs or len(shape(outputs[0])) < 2:
        return 0, size
    out = shape(outputs[0])
    channels = int(layer.get("OutMaps", 0)) or (out[1] if len(out) == 4 else out[-1])
    words = str(weights.get("Type", "")).lower()
    return 2 * count * math.prod(out) // max(channels, 1), size + count * (2 if "half" in words or "16" in words else 4)


def _known(kernels: Sequence[Kernel]) -> float:
    """Milliseconds of those whose FLOPs are known."""
    return sum(kernel.ms for kernel in kernels if kernel.flops)


def _cupti(call: Callable[[], None], runs: int) -> list[Kernel]:
    """Means over `runs`; empty if PyTorch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    from torch.profiler import ProfilerActivity, profile

    call()
    with launches() as launched, profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            call()
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    return attributed([(str(event.name), event.time_range.elapsed_us() / 1000) for event in events], launched, runs)
