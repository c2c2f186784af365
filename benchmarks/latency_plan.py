"""How a bundle's denoiser was quantised, as the bundle itself has it, so that PyTorch beside the engine rounds as it does.

Its portable graph holds formats, scales and corrections (export/qdq_nodes.py), but for what is put into the engine alone: fp8 on
sm90. Of that denoiser/quantization.json has the formats, and a token's own scale is taken for all activations: where the engine's
are fixed it errs more, so the bound is the narrower one.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor

from apps.cli.inspect import read_quantization
from engines.bundle import Bundle
from engines.errors import BundleError
from engines.spec import QUANTIZED, ComponentName, Precision
from sana_ref.quantization import Format, LayerPlan, QuantizationPlan, group_of, groups_of

__all__ = ["bundle_plan", "has_narrow_weights"]

# Numbers of weights: suffix of their name, type, format. The portable graph has two numbers of NVFP4 a byte.
_NUMBERS: dict[tuple[str, int], Format] = {
    ("weight_numbers", TensorProto.INT8): "int8",
    ("weight_numbers", TensorProto.FLOAT8E4M3FN): "fp8",
    ("weight_numbers_packed", TensorProto.UINT8): "nvfp4",
}
_READ = ("input_scale", "inverse_smooth", "low_rank_down", "low_rank_up", "weight_scale")


def bundle_plan(bundle: Bundle, parameters: Iterable[str], device: str = "cpu") -> QuantizationPlan | None:
    """parameters: names of the transformer's. device: of the plan's tensors. None: the denoiser is not quantised.

    Raises BundleError for a graph without the scales that its format needs.
    """
    precision = bundle.manifest.precision["denoiser"]
    if precision not in QUANTIZED:
        return None
    found = _of_graph(bundle, device)
    if found.layers:
        return found
    if precision is not Precision.FP8:
        raise BundleError(f"{bundle.path}: got no quantised product in the denoiser's graph; expected {precision}. Rebuild.")
    report = read_quantization(bundle)
    formats = dict.fromkeys(groups_of(parameters), "fp8") if report is None else report.formats
    return QuantizationPlan(layers={group: LayerPlan(format="fp8") for group, kind in formats.items() if kind == Precision.FP8})


def has_narrow_weights(bundle: Bundle, component: ComponentName) -> bool:
    """Whether its portable graph stores weights in 4 or 8 bits."""
    nodes = onnx.load(bundle.onnx_path(component), load_external_data=False).graph.node
    return any(node.op_type == "DequantizeLinear" for node in nodes)


def _of_graph(bundle: Bundle, device: str) -> QuantizationPlan:
    path = bundle.onnx_path("denoiser")
    formats: dict[str, Format] = {}
    read: dict[str, Tensor] = {}
    for each in onnx.load(path, load_external_data=False).graph.initializer:
        prefix, _, suffix = each.name.rpartition(".")
        group = _group(prefix)
        if group is None:
            continue
        if (suffix, each.data_type) in _NUMBERS:
            formats[group] = _NUMBERS[suffix, each.data_type]
        elif suffix in _READ:
            if each.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(each, str(path.parent))
            read[f"{group}.{suffix}"] = torch.tensor(numpy_helper.to_array(each)).float().to(device)
    layers: dict[str, LayerPlan] = {}
    tensors: dict[str, Tensor] = {}
    for group, kind in formats.items():
        scale = read.get(f"{group}.input_scale")
        if scale is None and kind == "nvfp4":
            raise BundleError(f"{path}, {group}: got nvfp4 without input_scale; expected the scale of its block scales. Rebuild.")
        layers[group] = LayerPlan(format=kind, input_scale=None if scale is None else float(scale))
        tensors |= {name: read[name] for name in (f"{group}.low_rank_down", f"{group}.low_rank_up") if name in read}
        if f"{group}.inverse_smooth" in read:
            tensors[f"{group}.smooth"] = 1.0 / read[f"{group}.inverse_smooth"]
        if kind != "nvfp4":  # a column where scales are found a token at a time
            tensors[f"{group}.weight_scale"] = read[f"{group}.weight_scale"].flatten()
    return QuantizationPlan(layers=layers, tensors=tensors)


def _group(prefix: str) -> str | None:
    """The group that is named so, behind what stands before it in a module's names."""
    start = prefix.find("transformer_blocks.")
    if start < 0:
        return None
    group = prefix[start:]
    weight = group.replace("attn1.to_qkv", "attn1.to_q")
    return group if group_of(f"{weight}.weight") == group else None
