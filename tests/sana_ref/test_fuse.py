"""The transformer as an engine is fastest, against itself operator by operator."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": "rms_norm_across_heads"}, {"attention_bias": True}, {"norm_elementwise_affine": True}],
    ids=str,
)
def test_fused_means_the_same(changes):
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
