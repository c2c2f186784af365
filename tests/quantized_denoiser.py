"""The smallest checkpoint's denoiser, quantised: plans from ranges that are seen, and what PyTorch makes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from tiny_build import RANGES, runner, shared, tiny

from engines.spec import Precision, component_precision
from export.cases import Arrays
from export.components import Component, components
from export.onnx_export import export_module, with_function_bodies
from export.plans import for_cublas
from export.qdq_nodes import quantize_graph
from export.reference import loaded, run_module
from export.references import denoiser_inputs
from export.weights import DATA_NAME, PORTABLE_NAME, TYPED_NAME, write_weights
from export.widen import widened
from sana_ref.checkpoint import load
from sana_ref.quantization import QuantizationPlan, groups_of
from sana_ref.quantized import MARGIN, InputRanges, QuantizedLinears, static_scale, uniform_plan

CUBLAS = "fp8 cublas"  # as an engine for sm90 has it


@functools.cache
def everything():
    return components(load(tiny()), component_precision(Precision.INT8))


def denoiser() -> Component:
    return everything()["denoiser"]


@functools.cache
def cases() -> dict[str, Arrays]:
    """64 px with guidance, two pictures of 64 x 96 px without."""
    return denoiser_inputs(runner(), everything(), RANGES)[0]()


@functools.cache
def exported() -> ir.Model:
    return export_module(denoiser().module, denoiser().spec)


@functools.cache
def plan(name: str) -> QuantizationPlan:
    """name: a format, with scales from the largest activations of `cases`; a format and "a token"; or CUBLAS.

    Half of the groups have smoothing and a low-rank branch, which cuBLASLt's have not.
    """
    kind, a_token = name.split()[0], name.endswith(" a token")
    module = loaded(denoiser().module, runner().loader(denoiser()), torch.float16)
    with InputRanges(module.transformer) as found:
        for inputs in cases().values():
            run_module(module, denoiser(), inputs)
    parameters = dict(module.named_parameters())
    groups = groups_of(parameters)
    room = MARGIN if name == CUBLAS else 1.5
    scales = {group: static_scale(kind, room * largest) for group, largest in found.largest().items()}
    made = uniform_plan(kind, groups, None if a_token else scales)
    if name == CUBLAS:
        return for_cublas(made)
    generator = torch.Generator().manual_seed(0)
    for group in list(groups)[::2]:
        columns, depth = sum(parameters[name].shape[0] for name in groups[group]), parameters[groups[group][0]].shape[1]
        made.tensors[f"{group}.smooth"] = torch.rand(depth, generator=generator) + 0.7
        made.tensors[f"{group}.low_rank_down"] = (torch.randn(3, depth, generator=generator) * 0.02).half()
        made.tensors[f"{group}.low_rank_up"] = torch.randn(columns, 3, generator=generator).half()
    return made


@functools.cache
def graphs(name: str) -> Path:
    """The folder of the typed and the portable graph."""
    folder = shared() / "qdq" / name.replace(" ", "_")
    folder.mkdir(parents=True)
    model = exported().clone()
    load = quantize_graph(model, plan(name), runner().loader(denoiser()), torch.float16)
    write_weights(model, load, folder / DATA_NAME)
    for file, graph in ((TYPED_NAME, model), (PORTABLE_NAME, widened(model))):
        ir.save(with_function_bodies(graph), folder / file)
        onnx.checker.check_model(str(folder / file), full_check=True)
    return folder


def simulated(
    made: QuantizationPlan, dtype: torch.dtype, given: Mapping[str, Arrays] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Case: output: array, of `cases` unless others are given. The stored weights' products as planned, all else in `dtype`."""
    module = loaded(denoiser().module, runner().loader(denoiser()), torch.float16).to(dtype)
    found = {}
    for case, inputs in (given or cases()).items():
        arguments = [
            torch.from_numpy(np.ascontiguousarray(inputs[tensor.name])).to(dtype if tensor.dtype == "float16" else torch.float32)
            for tensor in denoiser().spec.inputs
        ]
        with torch.inference_mode(), QuantizedLinears(module.transformer, made):
            results = module(*arguments)
        found[case] = {
            t.name: result.float().numpy() if result.itemsize == 2 else result.numpy()
            for t, result in zip(denoiser().spec.outputs, results, strict=True)
        }
    return found
