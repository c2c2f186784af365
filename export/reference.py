"""What the numbers should be: the PyTorch model in a wider type, and how far PyTorch itself is off at the component's precision.

All runs share one copy of the weights, as the bundle stores them. The reference is fp64 where a component is fp32 itself, and for
small ones, where it costs nothing; PyTorch's error in fp32 can then be seen, which the portable graph is held to. For large ones
the reference is fp32.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from engines.golden import Golden
from engines.parity_report import ErrorStats, measure
from engines.spec import Precision
from export.cases import Arrays
from export.components import Component
from export.wide import Wide
from sana_ref.quantized import QuantizedLinears
from sana_ref.quantized_convs import QuantizedConvs

__all__ = ["CaseStats", "PyTorchErrors", "loaded", "make_reference", "reference_dtype", "run_module", "simulation"]

SMALL_BYTES = 128 << 20  # of weights, up to which the reference is fp64

CaseStats = dict[str, dict[str, ErrorStats]]  # case: output: its error


class PyTorchErrors(BaseModel):
    """PyTorch against the reference, by case and output. fp32: with the same weights; none if that is `own` or the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    own: CaseStats  # at the component's precision
    fp32: CaseStats | None


def loaded(module: nn.Module, load: Callable[[str], Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of `module`, which is on the meta device and stays there, with parameters read one by one, in `dtype`."""
    module = copy.deepcopy(module)
    module.load_state_dict({name: load(name).to(dtype) for name, _ in module.named_parameters()}, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def run_module(
    module: nn.Module, component: Component, inputs: Arrays, wide: torch.dtype | None = None
) -> dict[str, NDArray[np.generic]]:
    """The outputs on the CPU, by name; 16-bit ones as fp32. wide: compute in this type; None: as the module does."""
    arguments = [torch.from_numpy(np.ascontiguousarray(inputs[t.name])).to(t.torch_dtype) for t in component.spec.inputs]
    with torch.inference_mode(), nullcontext() if wide is None else Wide(wide):
        results = module(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    results = [result.float() if result.itemsize == 2 else result for result in results]
    return {t.name: result.numpy() for t, result in zip(component.spec.outputs, results, strict=True)}


def reference_dtype(component: Component) -> torch.dtype:
    size = sum(p.numel() * p.element_size() for p in component.module.parameters())
    return torch.float64 if component.precision is Precision.FP32 or size <= SMALL_BYTES else torch.float32


def make_reference(
    component: Component, cases: Mapping[str, Arrays], load: Callable[[str], Tensor]
) -> tuple[dict[str, Golden], PyTorchErrors]:
    """Run every case in the reference's type, at the component's precision, and in fp32 where that is a third.

    load: parameter name -> tensor as the checkpoint stores it. A quantized component's own precision is the simulation; where its
    portable graph is quantized too, PyTorch in fp32 says nothing of it.
    """
    module = loaded(component.module, load, component.dtype)
    exact_dtype = reference_dtype(component)
    golden = {case: Golden(inputs=dict(i), outputs=run_module(module, component, i, exact_dtype)) for case, i in cases.items()}
    with simulation(component, module):
        own = _errors(golden, lambda inputs: run_module(module, component, inputs))
    fp32 = None
    if component.precision is not Precision.FP32 and component.graph_plan is None and exact_dtype is torch.float64:
        fp32 = _errors(golden, lambda inputs: run_module(module, component, inputs, torch.float32))
    return golden, PyTorchErrors(own=own, fp32=fp32)


def simulation(component: Component, module: nn.Module) -> AbstractContextManager[object]:
    """Inside it the planned layers of `module`, which is the component's and has weights, compute as planned."""
    if component.plan is None:
        return nullcontext()
    if component.name == "decoder":
        return QuantizedConvs(module, component.plan)
    return QuantizedLinears(module.get_submodule(component.prefix.removesuffix(".")), component.plan)


def _errors(golden: Mapping[str, Golden], run: Callable[[Arrays], Mapping[str, NDArray[np.generic]]]) -> CaseStats:
    """At least what storing the exact answer in fp32 costs, which no boundary between components exceeds."""
    stats: CaseStats = {}
    for case, example in golden.items():
        got = run(example.inputs)
        stats[case] = {}
        for name, exact in example.outputs.items():
            error, rounding = measure(got[name], exact), measure(exact.astype(np.float32), exact)
            stats[case][name] = ErrorStats(rms=max(error.rms, rounding.rms), max=max(error.max, rounding.max), mean=error.mean)
    return stats
