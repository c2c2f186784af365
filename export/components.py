"""The three graphs of a bundle: which module each is exported from, its inputs and outputs, and the shapes that it serves.

Everything that a graph is held to is computed here from the configs, apart from the graph itself: what an export lost cannot hide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engines.spec import PX_PER_LATENT, ComponentName, Precision, ShapeRange
from export.onnx_export import Axis, ExportSpec, TensorSpec
from plugins import gated_depthwise_conv, qkv_linear_attention, relu_linear_attention
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig, MultiscaleLinearAttention
from sana_ref.checkpoint import Checkpoint
from sana_ref.components import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    TEXT_ENCODER_INPUTS,
    TEXT_ENCODER_OUTPUTS,
    DecoderForExport,
    TextEncoderForExport,
)
from sana_ref.step import OUTPUTS, DenoiserStep
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse

__all__ = ["TORCH_DTYPES", "Component", "Profile", "components", "profiles"]

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input: smallest, most common, largest shape


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph. `module` is on the meta device, at the component's precision."""

    name: ComponentName
    source: Literal["text_encoder", "transformer", "vae"]  # where in the checkpoint the weights are
    prefix: str  # of parameter names in the module
    checkpoint_prefix: str  # of the same names in the checkpoint's folder
    precision: Precision
    module: nn.Module
    spec: ExportSpec

    def checkpoint_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter of the module."""
        return self.checkpoint_prefix + parameter.removeprefix(self.prefix)


def _axes(*names: str) -> tuple[Axis, ...]:
    """Examples differ from each other and from the fixed sizes, so that no coincidence of sizes enters a graph."""
    examples = {"batch": 3, "guidance": 2, "height": 4, "width": 6}
    return tuple(Axis(name=name, example=examples[name], maximum=1 << 16) for name in names)


def text_encoder(config: Gemma2Config, precision: Precision, max_sequence_length: int) -> Component:
    length = max_sequence_length
    with torch.device("meta"):
        module = TextEncoderForExport(Gemma2Encoder(config), length)
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
            plugins={},
        ),
    )


def denoiser(config: SanaTransformerConfig, precision: Precision, max_sequence_length: int) -> Component:
    with torch.device("meta"):
        module = DenoiserStep(SanaTransformer2DModel(config))
    fuse(module)
    latents = ("batch", config.in_channels, "height", "width")
    dims: dict[str, tuple[int | str, ...]] = {
        "latents": latents,
        "previous": latents,
        "coefficients": (8,),
        "guidance_weights": ("guidance",),
        "prompt_embeds": ("guidance", "batch", max_sequence_length, config.caption_channels),
        "prompt_mask": ("guidance", "batch", max_sequence_length),
        "guidance_scale": (1,),
        "noise": latents,
    }
    return Component(
        name="denoiser",
        source="transformer",
        prefix="transformer.",
        checkpoint_prefix="",
        precision=precision,
        module=module.to(TORCH_DTYPES[precision]),
        spec=ExportSpec(
            axes=_axes("batch", "guidance", "height", "width"),
            inputs=tuple(TensorSpec(name=name, dims=dims[name]) for name in module.input_names),
            outputs=tuple(TensorSpec(name=name, dims=latents) for name in OUTPUTS),
            plugins=dict.fromkeys(
                (gated_depthwise_conv.OP, qkv_linear_attention.APPLY, qkv_linear_attention.STATE), config.num_layers
            ),
        ),
    )


def decoder(config: AutoencoderDCConfig, precision: Precision) -> Component:
    with torch.device("meta"):
        module = DecoderForExport(AutoencoderDC(config))
    num_attention = sum(isinstance(each, MultiscaleLinearAttention) for each in module.modules())
    cells = config.px_per_latent
    return Component(
        name="decoder",
        source="vae",
        prefix="decoder.",
        checkpoint_prefix="decoder.",
        precision=precision,
        module=module.to(TORCH_DTYPES[precision]),
        spec=ExportSpec(
            axes=_axes("batch", "height", "width"),
            inputs=(TensorSpec(name=DECODER_INPUTS[0], dims=("batch", config.latent_channels, "height", "width")),),
            outputs=(TensorSpec(name=DECODER_OUTPUTS[0], dims=("batch", config.in_channels, f"{cells}*height", f"{cells}*width")),),
            plugins={relu_linear_attention.OP: num_attention} if num_attention else {},
        ),
    )


def profiles(component: Component, ranges: ShapeRange, *, instructed_tokens: int, embedded_guidance: bool) -> Profile:
    """The shapes that one engine serves.

    instructed_tokens: length S of a prompt with its instruction; without one, max_sequence_length. embedded_guidance: Sprint, which
    has one text an image.
    """
    guidance = 1 if embedded_guidance else 2
    cells = [side // PX_PER_LATENT for side in (ranges.min_side, ranges.opt_side, ranges.max_side)]
    lengths = (ranges.max_sequence_length, instructed_tokens, instructed_tokens)
    sizes: list[Mapping[str, int]] = [
        {"batch": batch, "guidance": k, "height": side, "width": side, "tokens": tokens}
        for batch, k, side, tokens in zip((1, 1, ranges.max_batch), (1, guidance, guidance), cells, lengths, strict=True)
    ]
    smallest, common, largest = sizes
    return {t.name: (t.shape(smallest), t.shape(common), t.shape(largest)) for t in component.spec.inputs}


def components(checkpoint: Checkpoint, precisions: Mapping[ComponentName, Precision]) -> dict[ComponentName, Component]:
    """All three, in the order in which a picture passes through them, without weights."""
    length = checkpoint.prompt.max_sequence_length
    return {
        "text_encoder": text_encoder(checkpoint.text_encoder_config, precisions["text_encoder"], length),
        "denoiser": denoiser(checkpoint.transformer_config, precisions["denoiser"], length),
        "decoder": decoder(checkpoint.vae_config, precisions["decoder"]),
    }
