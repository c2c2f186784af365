"""The parity check: what a bundle computes against the reference, held to twice PyTorch's own error at the same precision.

ONNX Runtime runs the portable graph on any machine. TensorRT runs the engine where a GPU of its architecture is. Each case of each
output has its own bound; the report keeps the worst case of each number.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.errors import ParityError
from engines.golden import Golden
from engines.parity_report import ComponentParity, ErrorStats, OutputParity, bound_from, check, measure
from engines.spec import ComponentName, Precision
from export.reference import CaseStats, PyTorchErrors

__all__ = ["component_parity", "measured", "run_onnxruntime"]

Outputs = Mapping[str, Mapping[str, NDArray[np.generic]]]  # case: output: array


def run_onnxruntime(graph: Path, golden: Mapping[str, Golden], *, frugal: bool) -> dict[str, dict[str, NDArray[np.generic]]]:
    """Run the portable graph's cases on the CPU.

    frugal: keep the weights as they are stored and widen each when it is used, instead of all at once when the graph is loaded:
    half the memory or less, the same numbers, and slower.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns about each constant that it cannot fold
    session = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"] if frugal else None
    )
    names = [output.name for output in session.get_outputs()]
    return {case: dict(zip(names, session.run(names, example.inputs), strict=True)) for case, example in golden.items()}


def measured(
    component: ComponentName, backend: str, got: Outputs, golden: Mapping[str, Golden], pytorch: PyTorchErrors
) -> CaseStats:
    """The error of every case and output. Raises ParityError, naming each number that is past its bound."""
    stats: CaseStats = {}
    wrong: list[str] = []
    for case, example in golden.items():
        stats[case] = {}
        for name, exact in example.outputs.items():
            try:
                error = measure(got[case][name], exact)
            except ParityError as unusable:
                raise ParityError(f"{component}, {name} ({backend}, case {case!r}): {unusable}") from None
            stats[case][name] = error
            bound = bound_from(pytorch.cases[case][name])
            wrong += [f"  {component}, {name} ({backend}, case {case!r}): {sentence}" for sentence in check(error, bound)]
    if wrong:
        raise ParityError(
            f"{component}: {backend} differs from the PyTorch reference by more than the bound.\n" + "\n".join(wrong) + "\n"
            "The graph or its kernels compute something else than the model: no bundle was written."
        )
    return stats


def _worst(stats: Iterable[ErrorStats]) -> ErrorStats:
    each = list(stats)
    return ErrorStats(rms=max(s.rms for s in each), max=max(s.max for s in each), mean=max((s.mean for s in each), key=abs))


def component_parity(
    precision: Precision, pytorch: PyTorchErrors, onnxruntime: CaseStats, tensorrt: CaseStats | None
) -> ComponentParity:
    """The report of one component: for each number the worst of its cases."""
    outputs = {}
    for name in next(iter(pytorch.cases.values())):
        own = _worst(case[name] for case in pytorch.cases.values())
        outputs[name] = OutputParity(
            pytorch=own,
            onnxruntime=_worst(case[name] for case in onnxruntime.values()),
            tensorrt=None if tensorrt is None else _worst(case[name] for case in tensorrt.values()),
            bound=bound_from(own),
        )
    return ComponentParity(precision=precision, outputs=outputs)
