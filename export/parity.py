"""The parity check: what a bundle computes against the reference, held to twice PyTorch's own error at the same precision.

ONNX Runtime runs the portable graph on any machine. TensorRT runs the engine where a GPU of its architecture is. A bound on the
size of the error holds for each case; the mean is taken over all of them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.errors import ParityError
from engines.golden import Golden
from engines.parity_report import (
    FACTOR,
    ComponentParity,
    ErrorStats,
    OutputParity,
    bound_from,
    check_bias,
    check_size,
    measure,
    pooled,
    portable_bound_from,
)
from engines.spec import LEVELS, NOT_FINITE, ComponentName
from export.reference import PyTorchErrors
from runtime.image import to_levels

__all__ = ["bounds", "measured", "run_onnxruntime", "run_tensorrt", "summary", "without_levels"]

Backend = Literal["onnxruntime", "tensorrt"]
BACKENDS: dict[Backend, str] = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}
Outputs = Mapping[str, Mapping[str, NDArray[np.generic]]]  # case: output: array


def run_onnxruntime(graph: Path, golden: Mapping[str, Golden], *, frugal: bool) -> dict[str, dict[str, NDArray[np.generic]]]:
    """Run the portable graph's cases on the CPU.

    frugal: keep the weights as they are stored and widen each when it is used, instead of all at once when the graph is loaded:
    half the memory or less, the same numbers, and slower.
    """
    import onnxruntime

    from runtime.ort_session import exact_products

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns about each constant that it cannot fold
    exact_products(options)
    session = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"] if frugal else None
    )
    names = [output.name for output in session.get_outputs()]
    return {case: dict(zip(names, session.run(names, example.inputs), strict=True)) for case, example in golden.items()}


def bounds(pytorch: PyTorchErrors, golden: Mapping[str, Golden] | None = None) -> dict[str, OutputParity]:
    """Each output's bounds, with nothing measured against them yet. A bound holds for every case: PyTorch's worst decides.

    golden: of a quantized graph. Roundings to few numbers have a mean of their own, so all cases' mean may be twice PyTorch's.
    """
    found = {}
    for name in next(iter(pytorch.own.values())):
        own = _largest(case[name] for case in pytorch.own.values())
        bound = bound_from(own)
        if golden is not None:
            together = pooled([(stats[name], golden[case].outputs[name].size) for case, stats in pytorch.own.items()])
            share = FACTOR * abs(together.mean) / together.rms if together.rms else 0.0
            bound = bound.model_copy(update={"mean_share": max(bound.mean_share, share)})
        fp32 = None if pytorch.fp32 is None else _largest(case[name] for case in pytorch.fp32.values())
        found[name] = OutputParity(
            pytorch=own,
            bound=bound,
            pytorch_fp32=fp32,
            portable_bound=None if fp32 is None else portable_bound_from(own, fp32),
        )
    return found


def measured(
    component: ComponentName,
    backend: Backend,
    got: Outputs,
    golden: Mapping[str, Golden],
    parity: Mapping[str, OutputParity],
) -> dict[str, ErrorStats]:
    """The error of every output: the size in the worst case, the mean of all. Raises ParityError, naming what is past its bound."""
    stats: dict[str, list[tuple[ErrorStats, int]]] = {name: [] for name in parity}
    wrong: list[str] = []
    for case, example in golden.items():
        for name, exact in example.outputs.items():
            where = f"{component}, {name} ({BACKENDS[backend]}, case {case!r})"
            try:
                error = measure(got[case][name], exact)
            except ParityError as unusable:
                raise ParityError(f"{where}: {unusable} No bundle was written.") from None
            stats[name].append((error, exact.size))
            wrong += [f"{where}: {sentence}" for sentence in check_size(error, parity[name].bound_of(backend))]
    together = {name: pooled(cases) for name, cases in stats.items()}
    for name, error in together.items():
        sentences = check_bias(error, parity[name].bound_of(backend))
        wrong += [f"{component}, {name} ({BACKENDS[backend]}, all cases): {sentence}" for sentence in sentences]
    if wrong:
        raise ParityError(
            "\n".join(wrong) + f"\n{BACKENDS[backend]} computes something else than the model, so no bundle was written. "
            "The graph, a kernel or the stored weights are wrong: look at what changed since parity last held."
        )
    largest = {name: _largest(error for error, _ in cases) for name, cases in stats.items()}
    return {name: largest[name].model_copy(update={"mean": together[name].mean}) for name in stats}


def run_tensorrt(engine: Path, golden: Mapping[str, Golden]) -> dict[str, dict[str, NDArray[np.generic]]]:
    """Run the engine's cases on the GPU that is here. Raises ParityError as without_levels."""
    from engines import tensorrt, tensorrt_library
    from plugins import shell
    from runtime.cuda import Cuda
    from runtime.trt_session import Arena, TensorRT, TensorRTSession

    library = TensorRT(
        module=tensorrt.load(),
        load=lambda path: tensorrt.deserialize(path, register_plugins=shell.register),
        why=tensorrt_library.why,
    )
    cuda = Cuda()
    cuda.make_current()
    arena = Arena(cuda)
    session = TensorRTSession(engine, tensorrt=library, cuda=cuda, arena=arena)
    try:
        return {case: without_levels(case, session.run(example.inputs)) for case, example in golden.items()}
    finally:
        session.close()
        arena.close()
        cuda.close()


def without_levels(case: str, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """An engine's outputs as the graph has them. Raises ParityError if a decoder's levels are not of its images, to the bit."""
    found = dict(outputs)
    levels, not_finite = found.pop(LEVELS, None), found.pop(NOT_FINITE, None)
    if levels is None or not_finite is None:
        return found
    bad = (~np.isfinite(found["images"])).sum(axis=(1, 2, 3))
    if not np.array_equal(not_finite, bad):
        raise ParityError(f"decoder, {NOT_FINITE} (TensorRT, {case}): got {not_finite}; expected {bad}. No bundle was written.")
    if not bad.any() and (wrong := int((levels != to_levels(found["images"])).sum())):
        raise ParityError(
            f"decoder, {LEVELS} (TensorRT, {case}): got {wrong} of {levels.size} that are not those of its images; expected none. "
            "No bundle was written: this TensorRT compiles export/level_nodes.py's nodes wrongly."
        )
    return found


def summary(component: ComponentName, parity: ComponentParity) -> str:
    """One line for people: how much of the bound each output uses, and the errors behind it."""
    parts = []
    for name, output in parity.outputs.items():
        errors: tuple[tuple[Backend, ErrorStats | None], ...] = (("onnxruntime", output.onnxruntime), ("tensorrt", output.tensorrt))
        for backend, error in errors:
            if error is not None:
                bound = output.bound_of(backend)
                share = max(error.rms / bound.rms, error.max / bound.max)
                own = f"PyTorch {parity.precision} {output.pytorch.rms:.1e}"
                parts.append(f"{name} {BACKENDS[backend]} rms {error.rms:.1e} ({own}), {share:.0%} of the bound")
    return f"  {component}: " + "; ".join(parts)


def _largest(stats: Iterable[ErrorStats]) -> ErrorStats:
    """Of each number the largest."""
    each = list(stats)
    return ErrorStats(rms=max(s.rms for s in each), max=max(s.max for s in each), mean=max((s.mean for s in each), key=abs))
