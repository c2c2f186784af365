"""Small models of the published structure, with random weights."""

import dataclasses

import torch

from sana_ref.autoencoder import AutoencoderDCConfig
from sana_ref.transformer import SanaTransformerConfig

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
