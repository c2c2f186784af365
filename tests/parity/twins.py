"""Pairs of models, ours and the published implementation, with the same random weights."""

import dataclasses

import diffusers
import torch
import transformers
from small_models import TEXT_CHANNELS, randomise

from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig


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
