"""Pairs of models, ours and the published implementation, with the same random weights."""

import dataclasses

import diffusers
import torch
import transformers

from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig

WIDE = {"encoder_block_out_channels": (32, 64, 64, 64, 128, 128), "decoder_block_out_channels": (32, 64, 64, 64, 128, 128)}
TEXT_CHANNELS = 48


def tiny_transformer_config(**changes) -> SanaTransformerConfig:
    """The published structure at a width of 64, in three layers."""
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 3,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 64,
        "caption_channels": TEXT_CHANNELS,
    }
    return SanaTransformerConfig(**(tiny | changes))


def narrow(config: AutoencoderDCConfig) -> AutoencoderDCConfig:
    """The same structure with one layer where there are several, and few channels."""
    return dataclasses.replace(
        config,
        **WIDE,
        encoder_layers_per_block=tuple(min(1, n) for n in config.encoder_layers_per_block),
        decoder_layers_per_block=tuple(min(1, n) for n in config.decoder_layers_per_block),
    )


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter, also those that start as zeros or ones, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1 and not name.endswith("scale_shift_table"):
            parameter.normal_(0, (parameter[0].numel()) ** -0.5, generator=generator)
        else:
            parameter.normal_(0.5, 0.3, generator=generator)


def transformer_twins(config: SanaTransformerConfig) -> tuple[SanaTransformer2DModel, diffusers.SanaTransformer2DModel]:
    theirs = diffusers.SanaTransformer2DModel(**dataclasses.asdict(config)).eval()
    randomise(theirs)
    ours = SanaTransformer2DModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def autoencoder_twins(config: AutoencoderDCConfig) -> tuple[AutoencoderDC, diffusers.AutoencoderDC]:
    theirs = diffusers.AutoencoderDC(**dataclasses.asdict(config)).eval()
    randomise(theirs)
    ours = AutoencoderDC(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def text_encoder_twins(**changes) -> tuple[Gemma2Encoder, transformers.Gemma2Model]:
    tiny = {
        "vocab_size": 400,
        "hidden_size": TEXT_CHANNELS,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_implementation": "eager",
    }
    their_config = transformers.Gemma2Config(**(tiny | changes))
    theirs = transformers.Gemma2Model(their_config).eval()
    randomise(theirs)
    ours = Gemma2Encoder(Gemma2Config.from_json(their_config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert got.shape == expected.shape, f"got shape {tuple(got.shape)}; expected {tuple(expected.shape)}"
    return ((got - expected).abs().max() / expected.abs().max()).item()
