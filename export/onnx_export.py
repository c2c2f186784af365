"""From a PyTorch module without weights to an ONNX graph without weights.

The module lives on the meta device, so an export costs no memory whatever the model's size; parameters become initializers that
carry only name, type and shape, and `export.weights` binds them to the bytes of the checkpoint by name. Constant folding would
otherwise need their values, so parameters are inputs of the graph while it is simplified.

The result depends on the module alone: node metadata (stack traces, file paths) is removed and names are the exporter's, so the
same module gives the same bytes.
"""

import functools
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer

from engines.errors import BuildError
from export import fp4_nodes, weight_only_nodes
from export.accumulation import accumulate_in_fp32
from export.scalars import keep_scalars_exact
from export.translation import OPSET, SANA_DOMAIN, translation_table
from plugins import (
    causal_attention,
    conv3x3,
    conv3x3_upsample,
    conv_taps,
    cross_attention,
    gated_depthwise_conv,
    modulated_norm,
    multiscale_projection,
    normed_sum,
    qkv_linear_attention,
    relu_linear_attention,
)

__all__ = ["Axis", "ExportSpec", "TensorSpec", "count_plugin_nodes", "export_module", "with_function_bodies"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
_ONNX_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}
IR_VERSION = 11  # of opset 23


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A dimension that is chosen when the graph runs. Exported at `example`, which must be neither 0 nor 1: those specialise."""

    name: str
    minimum: int = 1
    maximum: int = 1 << 20
    example: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or output of a graph. Each dimension is a number, or the name of an Axis.

    dtype: of the typed graph; the portable one has float32 for each floating type.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where each axis has the size that `sizes` gives."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSpec:
    """Names, shapes and plugin counts of one component's graph: what the exported graph is held to."""

    axes: tuple[Axis, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plugins: Mapping[str, int]  # op: nodes expected, counted from the model's config and not from the graph

    @property
    def examples(self) -> dict[str, int]:
        return {axis.name: axis.example for axis in self.axes}


def export_module(module: torch.nn.Module, spec: ExportSpec) -> ir.Model:
    """The graph of `module`, at the module's own precision; initializers are the parameters, by name, without values.

    module: on the meta device, in eval mode; forward takes the tensors of `spec.inputs` in that order and returns those of
    `spec.outputs`. Raises BuildError if a parameter or an expected plugin node did not arrive in the graph.
    """
    dims = {axis.name: torch.export.Dim(axis.name, min=axis.minimum, max=axis.maximum) for axis in spec.axes}
    examples = tuple(torch.empty(t.shape(spec.examples), dtype=t.torch_dtype, device="meta") for t in spec.inputs)
    dynamic = tuple({i: dims[dim] for i, dim in enumerate(t.dims) if isinstance(dim, str)} for t in spec.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporter uses its own deprecated names
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.export.export(
            module.eval(), examples, dynamic_shapes=(*dynamic,), strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        model = _to_onnx(program, spec)
    parameters = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    _simplify(model, parameters)
    accumulate_in_fp32(model)
    _name_dimensions(model, spec)
    double = [value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.DOUBLE]
    if double:
        raise BuildError(
            f"export: {double[0]!r} is computed in fp64; expected constants alone to be. export/translation.py takes exp() and "
            "pow() for frequencies, which are folded: give this one another translation."
        )
    missing = sorted(parameters - set(model.graph.initializers))
    if missing:
        raise BuildError(
            f"export: {len(missing)} parameters have no place in the graph, the first is {missing[0]!r}; expected all of them. "
            "A module that ignores a weight exports a different model: remove the parameter or use it."
        )
    found = count_plugin_nodes(model)
    if found != dict(spec.plugins):
        raise BuildError(
            f"export: got plugin nodes {found}; expected {dict(spec.plugins)}. An op was decomposed on the way to ONNX."
        )
    return model


def _to_onnx(program: torch.export.ExportedProgram, spec: ExportSpec) -> ir.Model:
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns that torchvision, which nothing here needs, is absent
    try:
        onnx_program = torch.onnx.export(
            program,
            (),
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=translation_table(),
            optimize=False,  # folds constants, which parameters without values cannot take part in
            verbose=False,
        )
    finally:
        registration.setLevel(level)
    assert onnx_program is not None
    return onnx_program.model


def _simplify(model: ir.Model, parameters: set[str]) -> None:
    """Fold constants and drop what is unused, with the parameters out of reach; then strip all metadata."""
    graph = model.graph
    hidden = {name: value for name, value in graph.initializers.items() if name in parameters}
    for name, value in hidden.items():
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    keep_scalars_exact(model)
    optimizer.optimize_ir(model)
    for name, value in hidden.items():
        graph.inputs.remove(value)
        if value.uses():
            graph.initializers[name] = value
    passes.ClearMetadataAndDocStringPass()(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "main"
    model.ir_version = IR_VERSION
    model.producer_name = "sana-deploy"
    model.producer_version = ""


def _name_dimensions(model: ir.Model, spec: ExportSpec) -> None:
    """Hold inputs and outputs to the spec, and let all dimensions have the names of axes: the exporter has symbols such as s18."""
    by_name = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    axis_of: dict[str, str] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        value = by_name[tensor.name]
        if value.shape is None or len(value.shape) != len(tensor.dims):
            raise BuildError(f"export: {tensor.name} has shape {value.shape}; expected {tensor.dims}")
        for got, expected in zip(value.shape, tensor.dims, strict=True):
            if isinstance(expected, int) and got != expected:
                raise BuildError(f"export: {tensor.name} has shape {value.shape}; expected {tensor.dims}")
            if isinstance(got, ir.SymbolicDim) and got.value is not None and expected in spec.examples:
                axis_of[got.value] = str(expected)
        if value.dtype != _ONNX_DTYPES[tensor.dtype]:
            raise BuildError(
                f"export: {tensor.name} is {value.dtype}; expected {tensor.dtype}, as the contract of the component says"
            )
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(dim, axis_of) for dim in value.shape])
    for tensor in (*spec.inputs, *spec.outputs):
        by_name[tensor.name].shape = ir.Shape(tensor.dims)


def _renamed(dim: int | ir.SymbolicDim, axis_of: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\bs\d+\b", lambda symbol: axis_of.get(symbol[0], symbol[0]), dim.value)


def count_plugin_nodes(model: ir.Model) -> dict[str, int]:
    """How many nodes of domain `sana` there are, by op."""
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.domain == SANA_DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def with_function_bodies(model: ir.Model) -> ir.Model:
    """Attach the body of every custom op that the graph uses, so that the model means something anywhere."""
    bodies: dict[str, Callable[[int], onnx.FunctionProto]] = {
        causal_attention.ATTEND: functools.partial(causal_attention.function_body, causal_attention.ATTEND),
        causal_attention.ROTATE: functools.partial(causal_attention.function_body, causal_attention.ROTATE),
        conv3x3.NORM: functools.partial(conv3x3.function_body, conv3x3.NORM),
        conv3x3.OP: functools.partial(conv3x3.function_body, conv3x3.OP),
        conv3x3_upsample.OP: conv3x3_upsample.function_body,
        conv_taps.OP: functools.partial(conv_taps.function_body, conv_taps.OP),
        conv_taps.SUM: functools.partial(conv_taps.function_body, conv_taps.SUM),
        cross_attention.OP: cross_attention.function_body,
        fp4_nodes.ROUND: functools.partial(fp4_nodes.function_body, fp4_nodes.ROUND),
        fp4_nodes.WEIGHT: functools.partial(fp4_nodes.function_body, fp4_nodes.WEIGHT),
        gated_depthwise_conv.OP: gated_depthwise_conv.function_body,
        modulated_norm.GATED: functools.partial(modulated_norm.function_body, modulated_norm.GATED),
        modulated_norm.PLAIN: functools.partial(modulated_norm.function_body, modulated_norm.PLAIN),
        multiscale_projection.OP: multiscale_projection.function_body,
        normed_sum.OP: normed_sum.function_body,
        qkv_linear_attention.APPLY: functools.partial(qkv_linear_attention.function_body, qkv_linear_attention.APPLY),
        qkv_linear_attention.STATE: functools.partial(qkv_linear_attention.function_body, qkv_linear_attention.STATE),
        relu_linear_attention.OP: relu_linear_attention.function_body,
        **{op: functools.partial(weight_only_nodes.function_body, kind) for kind, op in weight_only_nodes.ROWS.items()},
    }
    model.functions.clear()
    for op_name in sorted(count_plugin_nodes(model)):
        function = ir.serde.deserialize_function(bodies[op_name](OPSET))
        model.functions[function.identifier()] = function
        model.opset_imports[SANA_DOMAIN] = 1
    return model
