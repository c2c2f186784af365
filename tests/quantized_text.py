"""The smallest checkpoint's text encoder in W8A8: plans, its component, and what PyTorch makes of it."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from tiny_build import RANGES, component, runner, tiny
from tiny_recipes import recipe

from engines.spec import Precision
from export.cases import Arrays
from export.components import Component
from export.onnx_export import export_module
from export.quantization_plan import PLAN
from export.reference import loaded, run_module, simulation
from export.references import text_inputs
from export.text_calibration import calibrate_text
from export.wide import Wide
from sana_ref.checkpoint import load
from sana_ref.quantization import QuantizationPlan, groups_of, load_plan
from sana_ref.quantized import uniform_plan
from sana_ref.weight_only import HOST

PLANS = ("static", "a token", "kept")
QKV, OUT = "layers.0.self_attn.to_qkv", "layers.0.self_attn.o_proj"
GATE_UP, DOWN = "layers.0.mlp.to_gate_up", "layers.0.mlp.down_proj"


@functools.cache
def plan(name: str) -> QuantizationPlan:
    """static: calibrated and smoothed. kept: the same, without DOWN. a token: scales that are found while it runs."""
    if name == "a token":
        module = component("text_encoder", Precision.BF16).module
        return uniform_plan("int8", groups_of(each for each, _ in module.named_parameters()))
    keys = ["text_encoder=w8a8", *(["text_encoder_keep=['*.down_proj']"] if name == "kept" else [])]
    return load_plan(calibrate_text(load(tiny()), recipe("int8", *keys), store=runner().store) / PLAN)


@functools.cache
def encoder(name: str) -> Component:
    """Its table has int8 weights alone, and so has what the plan has not."""
    return replace(component("text_encoder", Precision.BF16), weights="int8", plan=plan(name))


@functools.cache
def exported(first_input: str = "input_ids") -> ir.Model:
    """The export knows nothing of plans, and takes most of the time. first_input: inputs_embeds for a table on the host."""
    part = replace(component("text_encoder", Precision.BF16), table=HOST if first_input == "inputs_embeds" else None)
    return export_module(part.graph_module, part.graph_spec)


@functools.cache
def cases() -> dict[str, Arrays]:
    return text_inputs(runner(), RANGES)[0]


def simulated(name: str, dtype: torch.dtype) -> dict[str, dict[str, np.ndarray]]:
    """Case: output: array. The stored weights' products as planned, all else in `dtype`."""
    part = encoder(name)
    module = loaded(part.module, runner().loader(part), part.dtype)
    planned = simulation(part, module)
    with Wide(dtype), planned:
        return {case: run_module(module, part, inputs) for case, inputs in cases().items()}
