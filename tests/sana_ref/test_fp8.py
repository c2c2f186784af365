"""FP8 linear layers in PyTorch."""

import copy

import pytest
import torch

from sana_ref import fp8
from sana_ref.fp8 import Fp8Linears, quantize_rows
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows(dtype):
    """Each row's largest number is 448 times its scale; half of an e4m3 step is the most that a number is off."""
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 64) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    bits, scale = quantize_rows(x)
    assert (bits.dtype, bits.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, x.shape, torch.float32, (3, 5))
    assert (bits.float().abs().amax(-1) == 448).all()
    error = (bits.float() * scale[..., None] - x.float()).abs()
    step = torch.maximum(x.float().abs() / 16, scale[..., None] * 2.0**-9)  # three bits of mantissa; below, subnormal numbers
    assert (error <= step * 1.001).all()


def test_rows_without_a_scale():
    zeros, nan = torch.zeros(2, 8), torch.tensor([[1.0, float("nan")]])
    bits, scale = quantize_rows(zeros)
    assert (bits.float() == 0).all()
    assert (scale > 0).all()
    assert quantize_rows(nan)[0].float().isnan().all()


def model():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    config = SanaTransformerConfig(
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=8, sample_size=8, **sizes
    )
    return SanaTransformer2DModel(config).eval().requires_grad_(False)


INPUTS = (torch.randn(2, 4, 5, 3), torch.randn(2, 7, 8), torch.tensor([500.0, 20.0]))


def test_layers_of_blocks_alone(monkeypatch):
    """Fused: q, k and v as one; to_out; q, k, v and to_out of the text's; both products of the mix-FFN. Nothing else."""
    fused = model()
    fuse(fused)
    exact = fused(*INPUTS)
    with Fp8Linears(fused):
        rounded = fused(*INPUTS)
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.2
    assert torch.equal(fused(*INPUTS), exact)
    seen = []
    monkeypatch.setattr(fp8, "_rounded", lambda x, scale=None: (seen.append(tuple(x.shape)), x)[1])
    with Fp8Linears(fused):
        fused(*INPUTS)
    weights = seen[1::2]
    assert sorted(weights) == sorted([(96, 32), *[(32, 32)] * 5, (160, 32), (32, 80)] * 2)


def test_fused_and_plain_round_the_same():
    plain = model()
    fused = copy.deepcopy(plain)
    fuse(fused)
    with Fp8Linears(fused):
        got = fused(*INPUTS)
    with Fp8Linears(plain):
        wanted = plain(*INPUTS)  # whose 1x1 convolutions are no linear layers, and stay exact
    assert (got - wanted).norm() / wanted.norm() < 0.1


def test_one_scale_for_all_tokens(monkeypatch):
    """Of the layer that it is for alone, also where the weight is a view; large numbers are cut off, NaN stays."""
    fused = model()
    fuse(fused)
    scales = {"transformer_blocks.1.ff.conv_point": 0.5, "transformer_blocks.0.attn2.to_out.0": 0.25}
    seen = []
    rounded = fp8._rounded
    monkeypatch.setattr(fp8, "_rounded", lambda x, scale=None: (seen.append((tuple(x.shape)[-1], scale)), rounded(x, scale))[1])
    with Fp8Linears(fused, scales):
        fused(*INPUTS)
    assert [each for each in seen if each[1]] == [(32, 0.25), (80, 0.5)]
    x = torch.tensor([1.0, 1.03, 300.0, -1e6, float("inf"), float("nan")])
    got = rounded(x, 0.5)
    assert got[:5].tolist() == [1.0, 1.0, 224.0, -224.0, 224.0]
    assert got[5].isnan()
