"""The graphs of a bundle: which module each is exported from, its inputs and outputs, and the shapes that it serves.

Everything that a graph is held to is computed here from the configs, apart from the graph itself: what an export lost cannot hide.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from engines.spec import PX_PER_LATENT, QUANTIZED, ComponentName, Precision, ShapeRange
from export.onnx_export import Axis, ExportSpec, TensorSpec
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
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig, per_stage
from sana_ref.checkpoint import Checkpoint
from sana_ref.components import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    TEXT_ENCODER_INPUTS,
    TEXT_ENCODER_OUTPUTS,
    TEXT_ROWS_INPUTS,
    DecoderForExport,
    TextEncoderForExport,
    TextRowsForExport,
)
from sana_ref.fused_decoder import FusedDecoder, in_taps, one_projection
from sana_ref.quantization import QuantizationPlan, group_of
from sana_ref.step import OUTPUTS, DenoiserStep
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.text_encoder import fuse as fuse_text
from sana_ref.text_projection import INPUTS as TEXT_PROJECTION_INPUTS
from sana_ref.text_projection import OUTPUTS as TEXT_PROJECTION_OUTPUTS
from sana_ref.text_projection import TextProjection, is_text_parameter
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse
from sana_ref.weight_only import HOST, TableFormat, TextFormat, TextPart, WeightFormat, formats_of

__all__ = ["TORCH_DTYPES", "Component", "Profile", "components", "profiles", "with_weights"]

# Of a module; quantized precisions are of its linear layers alone (export/qdq_nodes.py, export/fp8_nodes.py). See also `decoder`.
TORCH_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
    **dict.fromkeys(QUANTIZED, torch.float16),
}
Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input: smallest, most common, largest shape


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph. `module` is on the meta device, at the component's precision.

    plan: how it is quantized. in_engine: by nodes that are put into the engine's graph when it is compiled (export/fp8_nodes.py,
    export/quantized_conv_nodes.py); the exported graphs are not quantized then.
    weights: the format of linear layers and tables alone, activations staying as they are (export/weight_only_nodes.py); of those
    that a plan has not.
    table: of the text encoder's table of tokens, if it has another. On the host, it is in no graph: `module` and `spec`, which the
    reference runs, take token ids then, and the graphs the table's rows.
    """

    name: ComponentName
    source: Literal["text_encoder", "transformer", "vae"]  # where in the checkpoint the weights are
    prefix: str  # of parameter names in the module
    checkpoint_prefix: str  # of the same names in the checkpoint's folder
    precision: Precision
    module: nn.Module
    spec: ExportSpec
    plan: QuantizationPlan | None = None
    in_engine: bool = False
    weights: WeightFormat | None = None
    table: TableFormat | None = None

    @property
    def on_host(self) -> bool:
        """Whether the table of tokens is in a file of its own, and not in the graphs."""
        return self.table == HOST

    @property
    def graph_module(self) -> nn.Module:
        """What the graphs are exported from."""
        if not self.on_host:
            return self.module
        assert isinstance(self.module, TextEncoderForExport)
        return TextRowsForExport(self.module)

    @property
    def graph_spec(self) -> ExportSpec:
        """Of the graphs."""
        if not self.on_host:
            return self.spec
        rows, mask = TEXT_ROWS_INPUTS
        dims = ("batch", "tokens", self.spec.outputs[0].dims[-1])
        looked_up = TensorSpec(name=rows, dims=dims, dtype=str(self.dtype).removeprefix("torch."))
        return replace(self.spec, inputs=(looked_up, next(each for each in self.spec.inputs if each.name == mask)))

    @property
    def graph_plan(self) -> QuantizationPlan | None:
        """Of the exported graphs."""
        return None if self.in_engine else self.plan

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's parameters."""
        return next(self.module.parameters()).dtype

    @property
    def packed(self) -> dict[str, WeightFormat]:
        """Parameters that are stored in `weights` or `table`, with their format."""
        planned = {group for group, layer in self.plan.layers.items() if layer.format != "none"} if self.plan else set()
        formats = formats_of(self.module, self.weights, self.table)
        return {name: kind for name, kind in formats.items() if group_of(name) not in planned}

    def checkpoint_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter of the module."""
        return self.checkpoint_prefix + parameter.removeprefix(self.prefix)


def _axes(*names: str) -> tuple[Axis, ...]:
    """Examples differ from each other and from the fixed sizes, so that no coincidence of sizes enters a graph."""
    examples = {"batch": 3, "guidance": 2, "height": 4, "width": 6, "text_tokens": 11}
    return tuple(Axis(name=name, example=examples[name], maximum=1 << 16) for name in names)


def text_encoder(config: Gemma2Config, precision: Precision, max_sequence_length: int) -> Component:
    """Fused in half precision, if scores are capped, as all published ones are, and heads no wider than the kernel's."""
    length = max_sequence_length
    with torch.device("meta"):
        module = TextEncoderForExport(Gemma2Encoder(config), length)
    if precision is not Precision.FP32 and config.head_dim <= causal_attention.MAX_HEAD_DIM:
        fuse_text(module)
    a_layer = {causal_attention.ATTEND: 1, causal_attention.ROTATE: 1, normed_sum.OP: 2} if module.encoder.fused else {}
    tokens = Axis(name="tokens", minimum=length, example=length + 7, maximum=1 << 16)
    return Component(
        name="text_encoder",
        source="text_encoder",
        prefix="encoder.",
        checkpoint_prefix="",
        precision=precision,
        module=module.to(TORCH_DTYPES[precision]),
        spec=ExportSpec(
            axes=(*_axes("batch"), tokens),
            inputs=tuple(TensorSpec(name=name, dims=("batch", "tokens"), dtype="int64") for name in TEXT_ENCODER_INPUTS),
            outputs=(TensorSpec(name=TEXT_ENCODER_OUTPUTS[0], dims=("batch", length, config.hidden_size)),),
            plugins={op: count * config.num_hidden_layers for op, count in a_layer.items()},
        ),
    )


def _keys_values(config: SanaTransformerConfig, precision: Precision, tokens: int | str) -> tuple[TensorSpec, ...]:
    """What lies between text projection and denoiser. At their precision: each step reads it, and it stays on the device."""
    heads = (config.num_cross_attention_heads, tokens, config.cross_attention_head_dim)
    dims, dtype = (config.num_layers, "guidance", "batch", *heads), str(TORCH_DTYPES[precision]).removeprefix("torch.")
    return tuple(TensorSpec(name=name, dims=dims, dtype=dtype) for name in TEXT_PROJECTION_OUTPUTS)


def _keep_parameters(module: nn.Module, keep: Callable[[str], bool]) -> None:
    """Remove those whose names `keep` refuses, in place: a graph that needed one fails to export."""
    for name, _ in list(module.named_parameters()):
        if not keep(name):
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)


def text_projection(config: SanaTransformerConfig, precision: Precision) -> Component:
    """Tokens are projected one by one, so their number is free; the denoiser's is not, for the sake of its attention kernels."""
    with torch.device("meta"):
        module = TextProjection(SanaTransformer2DModel(config))
    _keep_parameters(module, is_text_parameter)
    return Component(
        name="text_projection",
        source="transformer",
        prefix="transformer.",
        checkpoint_prefix="",
        precision=precision,
        module=module.to(TORCH_DTYPES[precision]),
        spec=ExportSpec(
            axes=_axes("batch", "guidance", "text_tokens"),
            inputs=(
                TensorSpec(name=TEXT_PROJECTION_INPUTS[0], dims=("guidance", "batch", "text_tokens", config.caption_channels)),
            ),
            outputs=_keys_values(config, precision, "text_tokens"),
            plugins={},
        ),
    )


def _plugins(config: SanaTransformerConfig) -> set[str]:
    """Those of a block. The first norm of the first block has no sum before it, and the last norm of the model has."""
    norms = () if config.norm_elementwise_affine else (modulated_norm.GATED, modulated_norm.PLAIN)
    others = (cross_attention.OP, gated_depthwise_conv.OP, qkv_linear_attention.APPLY, qkv_linear_attention.STATE)
    return {*others, *norms}


def denoiser(config: SanaTransformerConfig, precision: Precision, max_sequence_length: int) -> Component:
    with torch.device("meta"):
        module = DenoiserStep(SanaTransformer2DModel(config))
    fuse(module)
    _keep_parameters(module, lambda name: not is_text_parameter(name))
    latents = ("batch", config.in_channels, "height", "width")
    others: dict[str, tuple[int | str, ...]] = {
        "latents": latents,
        "previous": latents,
        "coefficients": (8,),
        "guidance_weights": ("guidance",),
        "prompt_mask": ("guidance", "batch", max_sequence_length),
        "guidance_scale": (1,),
        "noise": latents,
    }
    inputs = {name: TensorSpec(name=name, dims=dims) for name, dims in others.items()}
    inputs |= {tensor.name: tensor for tensor in _keys_values(config, precision, max_sequence_length)}
    return Component(
        name="denoiser",
        source="transformer",
        prefix="transformer.",
        checkpoint_prefix="",
        precision=precision,
        module=module.to(TORCH_DTYPES[precision]),
        spec=ExportSpec(
            axes=_axes("batch", "guidance", "height", "width"),
            inputs=tuple(inputs[name] for name in module.input_names),
            outputs=tuple(TensorSpec(name=name, dims=latents) for name in OUTPUTS),
            plugins=dict.fromkeys(sorted(_plugins(config)), config.num_layers),
        ),
    )


def decoder_plugins(config: AutoencoderDCConfig, *, fused: bool) -> dict[str, int]:
    """How many nodes of each op the decoder's graph has."""
    widths, depths = config.decoder_block_out_channels, config.decoder_layers_per_block
    types = per_stage(config.decoder_block_types, len(widths))
    residual = [(width, depth) for kind, width, depth in zip(types, widths, depths, strict=True) if kind == "ResBlock"]
    num_attention = sum(depths) - sum(depth for _, depth in residual)
    if not fused:
        return {relu_linear_attention.OP: num_attention} if num_attention else {}
    num_norms = sum(depth for width, depth in residual if width <= conv3x3.MAX_NORM)
    num_convs = 2 * sum(depth for _, depth in residual) - num_norms
    num_ups = sum(depth > 0 for depth in depths[:-1]) + (depths[0] == 0)  # an empty first stage: the last convolution
    in_one = in_taps(widths[0], config.in_channels, config.decoder_conv_act_fn)
    num_convs += 1 + (depths[0] > 0 and not in_one)  # the first and the last of all
    num_taps = int(depths[0] > 0 and in_one)
    scaled = [
        depth
        for kind, sizes, depth in zip(types, config.decoder_qkv_multiscales, depths, strict=True)
        if kind != "ResBlock" and one_projection(config.attention_head_dim, sizes)
    ]
    counts = {conv3x3.NORM: num_norms, conv3x3.OP: num_convs, conv3x3_upsample.OP: num_ups}
    counts |= dict.fromkeys(conv_taps.INPUTS, num_taps)
    attention = (gated_depthwise_conv.OP, qkv_linear_attention.APPLY, qkv_linear_attention.STATE)
    counts |= dict.fromkeys(attention, num_attention) | {multiscale_projection.OP: sum(scaled)}
    return {op: count for op, count in counts.items() if count}


def decoder(config: AutoencoderDCConfig, precision: Precision) -> Component:
    """Fused in half precision; the kernels' sums are not as exact in fp32 as PyTorch's (sana_ref/conv_ops.py).

    FP8 or INT8 is of its residual blocks' convolutions; the rest is bf16 then, because fp16 overflows.
    """
    fused = precision is not Precision.FP32
    dtype = torch.bfloat16 if precision in QUANTIZED else TORCH_DTYPES[precision]
    with torch.device("meta"):
        vae = AutoencoderDC(config)
        module = DecoderForExport(vae, FusedDecoder(vae.decoder) if fused else None)
    cells = config.px_per_latent
    return Component(
        name="decoder",
        source="vae",
        prefix="decoder.",
        checkpoint_prefix="decoder.",
        precision=precision,
        module=module.to(dtype),
        spec=ExportSpec(
            axes=_axes("batch", "height", "width"),
            inputs=(TensorSpec(name=DECODER_INPUTS[0], dims=("batch", config.latent_channels, "height", "width")),),
            outputs=(TensorSpec(name=DECODER_OUTPUTS[0], dims=("batch", config.in_channels, f"{cells}*height", f"{cells}*width")),),
            plugins=decoder_plugins(config, fused=fused),
        ),
    )


def profiles(component: Component, ranges: ShapeRange, *, instructed_tokens: int, embedded_guidance: bool) -> Profile:
    """The shapes that one engine serves.

    instructed_tokens: length S of a prompt with its instruction; without one, max_sequence_length. embedded_guidance: Sprint, which
    has one text an image.
    """
    guidance = 1 if embedded_guidance else 2
    cells = [side // PX_PER_LATENT for side in (ranges.min_side, ranges.opt_side, ranges.max_side)]
    kept = ranges.max_sequence_length
    lengths, texts = (kept, instructed_tokens, instructed_tokens), (1, kept, kept)
    sizes: list[Mapping[str, int]] = [
        {"batch": batch, "guidance": k, "height": side, "width": side, "tokens": tokens, "text_tokens": text}
        for batch, k, side, tokens, text in zip(
            (1, 1, ranges.max_batch), (1, guidance, guidance), cells, lengths, texts, strict=True
        )
    ]
    smallest, common, largest = sizes
    return {t.name: (t.shape(smallest), t.shape(common), t.shape(largest)) for t in component.graph_spec.inputs}


def components(checkpoint: Checkpoint, precisions: Mapping[ComponentName, Precision]) -> dict[ComponentName, Component]:
    """All of them, in the order in which a picture passes through them, without weights."""
    length = checkpoint.prompt.max_sequence_length
    return {
        "text_encoder": text_encoder(checkpoint.text_encoder_config, precisions["text_encoder"], length),
        "text_projection": text_projection(checkpoint.transformer_config, precisions["text_projection"]),
        "denoiser": denoiser(checkpoint.transformer_config, precisions["denoiser"], length),
        "decoder": decoder(checkpoint.vae_config, precisions["decoder"]),
    }


def with_weights(
    everything: Mapping[ComponentName, Component], weights: Mapping[TextPart, TextFormat]
) -> dict[ComponentName, Component]:
    """The same, with the text's components storing `weights` (export/weight_only.py). w8a8 is int8 here, and a plan more later."""
    made = dict(everything)
    for part, asked in weights.items():
        kind: TableFormat = "int8" if asked == "w8a8" else asked
        if part == "text_encoder_table":
            made["text_encoder"] = replace(made["text_encoder"], table=kind)
        else:
            assert kind != HOST  # of the table alone
            made[part] = replace(made[part], weights=kind)
    return made
