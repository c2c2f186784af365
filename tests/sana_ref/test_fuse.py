"""The transformer as an engine is fastest, against itself operator by operator."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from sana_ref import attention_ops
from sana_ref.step import DenoiserStep, guidance_weights
from sana_ref.text_projection import TextProjection
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse

CHANGES = [{}, {"qk_norm": "rms_norm_across_heads"}, {"attention_bias": True}, {"norm_elementwise_affine": True}]


def plain_and_fused(changes):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    config = SanaTransformerConfig(
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=8, sample_size=8, **sizes, **changes
    )
    plain = SanaTransformer2DModel(config).double()
    for name, parameter in plain.named_parameters():
        if ".norm2." in name:  # 1 and 0, which would hide that they were left out
            nn.init.normal_(parameter)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_fused_means_the_same(changes):
    plain, fused = plain_and_fused(changes)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    inputs = (torch.randn(2, 4, 5, 3).double(), torch.randn(2, 7, 8).double(), torch.tensor([500.0, 20.0]).double())
    torch.testing.assert_close(fused(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        fused.transformer_blocks[0].attn1.to_k.weight[0] += 0.1
    assert (fused(*inputs) - plain(*inputs)).abs().max() > 1e-6


def test_norms_with_parameters_are_left_alone():
    config = SanaTransformerConfig(num_layers=1, norm_elementwise_affine=True)
    with torch.device("meta"):
        models = SanaTransformer2DModel(config), SanaTransformer2DModel(replace(config, norm_elementwise_affine=False))
    for model in models:
        fuse(model)
    assert [model.fused for model in models] == [False, True]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@torch.no_grad()
def test_fused_step_means_the_same(changes, monkeypatch):
    """Of two texts for three pictures, of which one is empty: each block's cross-attention reads its own keys and values."""
    plain, fused = plain_and_fused(changes)
    mask = torch.ones(2, 3, 7)
    mask[0, :, 1:] = mask[1, 1, 4:] = mask[1, 2] = 0
    latents, row = torch.randn(3, 4, 5, 3).double(), torch.tensor([500.0, 1, 0.9, -0.1, 0.2, 0.3, 1, -0.5])
    keys, values = TextProjection(plain)(torch.randn(2, 3, 7, 8))
    inputs = (latents, 0 * latents, row, guidance_weights(4.5, embedded=False), keys, values, mask)
    blocks = []

    def counted(q, keys, values, bias, block):
        blocks.append(block)
        return attention_ops.cross_attention_truth(q, keys, values, bias, block)

    monkeypatch.setattr(attention_ops, "cross_attention", counted)
    wanted = DenoiserStep(plain)(*inputs)
    assert blocks == []
    torch.testing.assert_close(DenoiserStep(fused)(*inputs), wanted, rtol=1e-6, atol=1e-6)  # velocities are summed in fp32
    assert blocks == [0, 1]
    keys = keys.clone()
    keys[1, 1, 0, 1, 0] += 1.0
    assert (DenoiserStep(fused)(*inputs[:4], keys, *inputs[5:])[0] - wanted[0]).abs().max() > 1e-4
