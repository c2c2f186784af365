"""What the numbers should be: the PyTorch model in a wider type, and how far PyTorch itself is off at the component's precision."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from engines.golden import Golden
from engines.parity_report import ErrorStats, measure
from engines.spec import Precision
from export.cases import Arrays
from export.components import TORCH_DTYPES, Component
from export.wide import Float64Mode

__all__ = ["PyTorchErrors", "loaded", "pytorch_errors", "reference_outputs", "run_module"]

CaseStats = dict[str, dict[str, ErrorStats]]  # case: output: its error


class PyTorchErrors(BaseModel):
    """PyTorch at the component's precision against the reference, by case and output."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    cases: CaseStats


def loaded(module: nn.Module, load: Callable[[str], Tensor], dtype: torch.dtype) -> nn.Module:
    """`module`, which is on the meta device, with its parameters read one by one and converted to `dtype`."""
    state = {name: load(name).to(dtype) for name, _ in module.named_parameters()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def run_module(
    module: nn.Module, inputs: Arrays, names: tuple[str, ...], outputs: tuple[str, ...]
) -> dict[str, NDArray[np.generic]]:
    """Run on CPU. `names`: the order of the arguments. Floating inputs take fp64 if the module's weights are."""
    wide = next(module.parameters()).dtype == torch.float64
    arguments = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names]
    with torch.inference_mode():
        if wide:
            with Float64Mode():
                results = module(*(a.double() if a.is_floating_point() else a for a in arguments))
        else:
            results = module(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    return {name: result.numpy() for name, result in zip(outputs, results, strict=True)}


def _names(component: Component) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(t.name for t in component.spec.inputs), tuple(t.name for t in component.spec.outputs)


def reference_outputs(
    fp32: Component, precision: Precision, cases: Mapping[str, Arrays], load: Callable[[str], Tensor]
) -> dict[str, Golden]:
    """Run every case in fp32, or in fp64 where the build itself is fp32.

    fp32: the component made at fp32. precision: the build's. load: parameter name -> tensor as the checkpoint stores it.
    """
    module = loaded(fp32.module, load, torch.float64 if precision is Precision.FP32 else torch.float32)
    return {case: Golden(inputs=dict(inputs), outputs=run_module(module, inputs, *_names(fp32))) for case, inputs in cases.items()}


def pytorch_errors(component: Component, golden: Mapping[str, Golden], load: Callable[[str], Tensor]) -> PyTorchErrors:
    """How far PyTorch is off at the component's precision: what the bounds are made of.

    At least what storing the exact answer costs, since every boundary between components is fp32.
    """
    module = loaded(component.module, load, TORCH_DTYPES[component.precision])
    cases: CaseStats = {}
    for case, example in golden.items():
        got = run_module(module, example.inputs, *_names(component))
        cases[case] = {}
        for name, exact in example.outputs.items():
            error, rounding = measure(got[name], exact), measure(exact.astype(np.float32), exact)
            cases[case][name] = ErrorStats(rms=max(error.rms, rounding.rms), max=max(error.max, rounding.max), mean=error.mean)
    return PyTorchErrors(cases=cases)
