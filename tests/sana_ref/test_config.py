"""Configs: what a published config.json gives, and what is refused."""

import json

import pytest

from engines.errors import SpecError
from sana_ref.autoencoder import AutoencoderDCConfig
from sana_ref.text_encoder import Gemma2Config
from sana_ref.transformer import SanaTransformerConfig


def test_underscored_keys_describe_the_file_and_lists_become_tuples():
    config = AutoencoderDCConfig.from_json(
        json.loads(
            '{"_class_name": "AutoencoderDC", "_diffusers_version": "0.32", "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]]}'
        )
    )
    assert config == AutoencoderDCConfig()
    assert hash(config) == hash(AutoencoderDCConfig())


def test_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(SpecError, match=r"got the unknown key 'num_layer'; did you mean 'num_layers'\?"):
        SanaTransformerConfig.from_json({"num_layer": 3})


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (SanaTransformerConfig, {"qk_norm": "layer_norm"}, "qk_norm: got 'layer_norm'"),
        (SanaTransformerConfig, {"dropout": 0.1}, "dropout: got 0.1"),
        (SanaTransformerConfig, {"num_attention_heads": 3}, "cross_attention_dim: got 2240; expected .* = 96"),
        (AutoencoderDCConfig, {"decoder_norm_types": ["batch_norm"] * 6}, "decoder_norm_types"),
        (AutoencoderDCConfig, {"decoder_conv_act_fn": "mish"}, "decoder_conv_act_fn: got 'mish'"),
        (AutoencoderDCConfig, {"encoder_layers_per_block": [2, 2]}, "encoder_layers_per_block: got .* expected 6 entries"),
        (Gemma2Config, {"model_type": "llama"}, "model_type: got 'llama'"),
        (Gemma2Config, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type: got 'yarn'"),
        (Gemma2Config, {"num_key_value_heads": 3}, "num_key_value_heads: got 3"),
        (Gemma2Config, {"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused(cls, values, message):
    with pytest.raises(SpecError, match=message):
        cls.from_json(values)


def test_text_encoder_config_in_either_spelling_of_rope():
    old = Gemma2Config.from_json({"model_type": "gemma2", "rope_theta": 5000.0, "transformers_version": "4.46"})
    new = Gemma2Config.from_json({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    assert old == new == Gemma2Config(rope_theta=5000.0)


def test_sliding_and_full_layers_alternate():
    config = Gemma2Config(num_hidden_layers=4, sliding_window=7)
    assert [config.looks_back(i) for i in range(4)] == [7, None, 7, None]
