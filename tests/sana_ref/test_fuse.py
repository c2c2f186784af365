"""The transformer as an engine is fastest, against itself operator by operator."""

import copy

import pytest
import torch

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "rms_norm_across_heads"}, {"attention_bias": True}], ids=str)
def test_fused_means_the_same(changes):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    config = SanaTransformerConfig(
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=8, sample_size=8, **sizes, **changes
    )
    plain = SanaTransformer2DModel(config).double()
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    inputs = (torch.randn(2, 4, 5, 3).double(), torch.randn(2, 7, 8).double(), torch.tensor([500.0, 20.0]).double())
    torch.testing.assert_close(fused(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        fused.transformer_blocks[0].attn1.to_k.weight[0] += 0.1
    assert (fused(*inputs) - plain(*inputs)).abs().max() > 1e-6
