"""What the runtime adds to its engines: start, memory, launches, and the host's time; of a bundle through TensorRT.

    python benchmarks/runtime_figures.py out/sana --name 1600m --record
    python benchmarks/runtime_figures.py out/sana --decoder --side 4096 --record

- launches_per_picture: graph launches, and engine launches beside them, for a text that is known; the note says it for a new one.
- kernels_per_step: kernel nodes in a CUDA graph of one denoiser step.
- host_per_step_ms: by how much a further step lengthens a request beyond its time on the GPU and the time until the graph's first
  work begins there: pictures of N and of 4 N steps, which are far apart because some tenths of a millisecond come and go.
- start_<name>_s: from SanaEngine(bundle) to the first picture, in a new process, engines in the page cache and what was compiled in
  a kernel cache (the second of two). The note has the first one, which compiles it, and where the time goes.
- peak_<name>_<px>px_{fp16,low_memory}_gb: most GPU memory in use while pictures are drawn, beyond what was in use before; the
  second of two processes, which finds its kernels compiled. The note has the first.
- decode_<px>px_<precision>_peak_gb, with --decoder: most GPU memory in use while the decoder alone is loaded and runs.

They are measured in this order, the quick ones first. Each is printed, and recorded, as soon as it is measured, so that an
interrupted run keeps what it had; stderr says what is measured now.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import UNSUPPORTED, record
from benchmarks.latency_run import gpu_memory_used
from benchmarks.latency_work import PROMPT, Work, graph_inputs, open_task, queued
from engines import tensorrt
from engines.bundle import Bundle
from engines.errors import RequestError, SanaError
from engines.gpu import device_info
from runtime import SanaEngine
from runtime.cuda import Cuda
from runtime.graphs import Loop
from runtime.schedule import MAX_STEPS
from runtime.trt_session import TensorRTSession

ROUNDS = 21
SAMPLE_S = 0.002  # between two looks at the GPU's memory
MORE_STEPS = 4  # times as many


def in_new_process(mode: str, options: argparse.Namespace, kernel_cache: str = "") -> dict[str, float]:
    """What `child` prints there. kernel_cache: a folder; "" for none. Raises SanaError if it fails."""
    command = [sys.executable, __file__, str(options.bundle), "--steps", str(options.steps), "--side", str(options.side)]
    command += ["--child", mode, "--kernel-cache", kernel_cache]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SanaError(f"{mode}: the process ended with {found.returncode}. It said: {found.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return answer


def peak_memory(mode: str, options: argparse.Namespace) -> tuple[float, str]:
    """GB, and a note."""
    with tempfile.TemporaryDirectory() as kernels:
        first, peak = (in_new_process(mode, options, kernels)["peak_gb"] for _ in range(2))
    return peak, f"beyond CUDA's own context; {first:.3g} GB the first time, when kernels are compiled"


def child(mode: str, options: argparse.Namespace) -> dict[str, float]:
    """ "start", "memory", "low_memory" or "decoder", in a process of its own."""
    kernels = Path(options.kernel_cache) if options.kernel_cache else False
    sizes = {"steps": options.steps, "width": options.side, "height": options.side}
    if mode == "start":
        began = time.perf_counter()
        with SanaEngine(options.bundle, backend="tensorrt", progress=False, kernel_cache=kernels) as engine:
            opened = time.perf_counter()
            engine.generate(PROMPT, **sizes)
            drawn = time.perf_counter()
            loads = {f"load_{name}_s": seconds for name, seconds in engine._backend.load_s.items()}  # type: ignore[union-attr]
            picture = sum(timings.total_s for timings in engine.last_timings)
            return {"open_s": opened - began, "start_s": drawn - began, "picture_s": picture, **loads}
    import torch

    torch.cuda.init()
    before = gpu_memory_used()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            free, total = torch.cuda.mem_get_info()
            peak = max(peak, total - free)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        if mode == "decoder":
            with SanaEngine(options.bundle, backend="tensorrt", progress=False, kernel_cache=kernels) as engine:
                with open_task(engine, Work(component="decoder", width=options.side, height=options.side, batch=1)) as task:
                    for _ in range(3):
                        task.stopwatch(task.call)
            return {"peak_gb": (peak - before) / 1e9}
        low_memory = mode == "low_memory"
        with SanaEngine(options.bundle, backend="tensorrt", progress=False, low_memory=low_memory, kernel_cache=kernels) as engine:
            for prompt in (PROMPT, PROMPT, f"{PROMPT}, in the rain"):  # the second is captured as a graph
                engine.generate(prompt, **sizes)
    finally:
        done.set()
        watcher.join()
    return {"peak_gb": (peak - before) / 1e9}


def host_per_step(engine: SanaEngine, options: argparse.Namespace) -> float:
    """ms"""
    rows: dict[int, list[float]] = {options.steps: [], MORE_STEPS * options.steps: []}
    launch = Loop.launch
    latency_s: list[Callable[[], float]] = []

    def watched(loop: Loop) -> None:
        """How long the GPU, which idles, waits for the graph's first work. The call itself goes on while the GPU is at work."""
        cuda, marks = loop._cuda, loop.marks
        before = cuda.mark()
        launch(loop)
        latency_s.append(lambda: cuda.seconds(before, marks._events[0]))

    Loop.launch = watched  # type: ignore[assignment, method-assign]
    try:
        for number in range(ROUNDS + 2):
            for steps, beyond in rows.items():  # by turns, so that both meet what else the machine does
                latency_s.clear()
                began = time.perf_counter()
                engine.generate(PROMPT, steps=steps, width=options.side, height=options.side)
                wall = time.perf_counter() - began
                if number >= 2:
                    on_gpu = sum(timings.total_s - timings.text_s for timings in engine.last_timings)
                    beyond.append(wall - on_gpu - sum(latency() for latency in latency_s))
    finally:
        Loop.launch = launch  # type: ignore[method-assign]
    fewer, more = (statistics.median(beyond) for beyond in rows.values())
    return 1000 * (more - fewer) / ((MORE_STEPS - 1) * options.steps)


def launches(engine: SanaEngine, options: argparse.Namespace, prompt: str) -> tuple[int, int]:
    """Graphs, and engines outside of them, for a picture that was drawn twice before."""
    counts = {"graphs": 0, "engines": 0}

    def counted(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            counts[kind] += 1
            return call(*arguments)

        return counting

    kept = Cuda.launch_graph, TensorRTSession.launch
    Cuda.launch_graph, TensorRTSession.launch = counted("graphs", kept[0]), counted("engines", kept[1])  # type: ignore[method-assign]
    try:
        engine.generate(prompt, steps=options.steps, width=options.side, height=options.side)
    finally:
        Cuda.launch_graph, TensorRTSession.launch = kept  # type: ignore[method-assign]
    return counts["graphs"], counts["engines"]


def kernels_per_step(engine: SanaEngine, side: int) -> int:
    from cuda.bindings import driver

    def checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise SanaError(f"CUDA: got {result[0]}; expected success")
        return result[1:]

    work = Work(component="denoiser", width=side, height=side, batch=1)
    inputs = graph_inputs(engine, work)
    with engine.session("denoiser") as session, queued(session, inputs) as launch:
        stream = session._cuda.stream  # type: ignore[attr-defined]
        launch()
        checked(driver.cuStreamSynchronize(stream))
        checked(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            launch()
        finally:
            (graph,) = checked(driver.cuStreamEndCapture(stream))
    _, count = checked(driver.cuGraphGetNodes(graph))
    nodes, _ = checked(driver.cuGraphGetNodes(graph, count))
    kernel = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    found = sum(checked(driver.cuGraphNodeGetType(node))[0] == kernel for node in nodes[:count])
    checked(driver.cuGraphDestroy(graph))
    return found


def _parts(start: dict[str, float]) -> str:
    """Where a start's time went, in words. Engines load at the same time."""
    loads = ", ".join(f"{key[5:-2].replace('_', ' ')} {value:.2f} s" for key, value in start.items() if key.startswith("load_"))
    return f"opened and verified after {start['open_s']:.2f} s, engines loaded in {loads}, picture {start['picture_s']:.2f} s"


def measure(options: argparse.Namespace) -> Iterator[tuple[str, float, str, str]]:
    """Name, value, unit and note of each figure, as soon as it is measured."""
    name, px = options.name, f"{options.side}px"
    if options.decoder:
        precision = Bundle.open(options.bundle).manifest.precision["decoder"]
        figure = f"decode_{px}_{precision}_peak_gb"
        _begin(f"{figure}, in two processes")
        peak, note = peak_memory("decoder", options)
        yield figure, peak, "GB", f"batch 1, no tiles; {note}"
        return
    _begin("launches_per_picture, kernels_per_step; first the bundle is opened and kernels are compiled")
    with SanaEngine(options.bundle, backend="tensorrt", progress=False, kernel_cache=False) as engine:
        sizes = {"steps": options.steps, "width": options.side, "height": options.side}
        for _ in range(2):  # the second is captured as a graph
            engine.generate(PROMPT, **sizes)
        graphs, engines = launches(engine, options, PROMPT)
        for weather in ("fog", "rain"):  # the arena has grown since the first text; the second of these is captured
            engine.generate(f"{PROMPT}, in the {weather}", **sizes)
        more = launches(engine, options, f"{PROMPT}, in the snow")
        note = f"{name}, {px}: of a text that is known, {engines} engines beside; of a new one {more[0]} and {more[1]}"
        yield "launches_per_picture", graphs, "launches", note
        yield "kernels_per_step", kernels_per_step(engine, options.side), "kernels", f"{name}, {px}"
        _begin(f"host_per_step_ms, {ROUNDS + 2} rounds of {options.steps} and {MORE_STEPS * options.steps} steps")
        yield "host_per_step_ms", host_per_step(engine, options), "ms", f"{name}, {px}"
    _begin(f"start_{name}_s, in three processes")
    with tempfile.TemporaryDirectory() as kernels:
        in_new_process("start", options)  # engines come into the page cache; no kernels are kept
        first, start = (in_new_process("start", options, kernels) for _ in range(2))
    note = f"{options.steps} steps, {px}; {_parts(start)}; without a kernel cache {first['start_s']:.2f} s: {_parts(first)}"
    yield f"start_{name}_s", start["start_s"], "s", note
    for mode, word in (("memory", "fp16"), ("low_memory", "low_memory")):
        figure = f"peak_{name}_{px}_{word}_gb"
        _begin(f"{figure}, in two processes")
        peak, note = peak_memory(mode, options)
        yield figure, peak, "GB", note


def _begin(what: str) -> None:
    """Say what is measured now, for it takes a while."""
    print(f"runtime_figures: {what} …", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", default="1600m", help="of the model, in the figures' names")
    parser.add_argument("--side", type=int, default=1024, help="px")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--decoder", action="store_true", help="its memory alone, and nothing else")
    parser.add_argument("--note", default="")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    parser.add_argument("--child", choices=("start", "memory", "low_memory", "decoder"), help=argparse.SUPPRESS)
    parser.add_argument("--kernel-cache", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if not options.child and not options.decoder and not 1 <= options.steps <= MAX_STEPS // MORE_STEPS:
            raise RequestError(
                f"--steps: got {options.steps}; expected 1 to {MAX_STEPS // MORE_STEPS}: {MORE_STEPS} times are drawn too."
            )
        if options.child:
            print(json.dumps(child(options.child, options)))
            return 0
        unsupported = UNSUPPORTED if device_info().capability == (9, 0) else ""
        versions = {"tensorrt": f"{tensorrt.flavor()} {tensorrt.version()}"}
        for name, value, unit, note in measure(options):
            print(f"{name}: {value:.4g} {unit} ({note})", flush=True)
            if options.record:
                note = "; ".join(filter(None, (note, options.note, unsupported)))
                record(name, value, unit, note=note, extra_versions=versions)
    except SanaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
