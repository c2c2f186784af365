"""The decoder as an engine is fastest, against itself operator by operator."""

import copy
from dataclasses import replace

import pytest
import torch
from parity.bound import assert_parity

from export.wide import Wide
from plugins import conv3x3
from sana_ref import fused_decoder
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.fused_decoder import FusedDecoder

SMALL = AutoencoderDCConfig(
    latent_channels=4,
    attention_head_dim=16,
    encoder_block_out_channels=(8, 8),
    encoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), ()),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_out_channels=(8, 16, 32),  # repeats of 2 and 2
    decoder_layers_per_block=(1, 2, 2),
    decoder_qkv_multiscales=((), (), (5,)),
)
CASES = {
    "shuffle": {},
    "interpolate": {"upsample_block_type": "interpolate"},
    "empty first stage": {"decoder_layers_per_block": (0, 1, 1)},
    "empty first stage, interpolate": {"decoder_layers_per_block": (0, 1, 1), "upsample_block_type": "interpolate"},
    "other activations": {"decoder_act_fns": ("relu", "silu", "silu"), "decoder_conv_act_fn": "silu"},
    "no shortcut": {"decoder_in_shortcut": False},
    "two scales": {"decoder_qkv_multiscales": ((), (), (3, 5))},
    "no scale": {"decoder_qkv_multiscales": ((), (), ())},
    "repeats of 1 and 4": {"decoder_block_out_channels": (16, 16, 64)},
    "repeats of 8": {"decoder_block_out_channels": (16, 64, 32)},
    "repeats of 3": {"decoder_block_out_channels": (6, 8, 32)},
}


LATENT = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def pair(changes, dtype=torch.float64):
    """(plain, fused), of random weights."""
    config = replace(SMALL, **changes)
    plain = AutoencoderDC(config).decoder
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():  # also those that start as zeros or ones
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    plain = plain.to(dtype)
    return plain, FusedDecoder(copy.deepcopy(plain))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@torch.no_grad()
def test_fused_means_the_same(changes, monkeypatch):
    monkeypatch.setattr(fused_decoder, "MAX_NORM", 8)  # norms of the convolution's kernel and of their own
    plain, fused = pair(changes)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    with Wide(torch.float64):  # also the norms' statistics, which are fp32 otherwise
        wanted, got = plain(LATENT), fused(LATENT)
    assert wanted.std() > 1e-2
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_fused_rounds_no_more(dtype):
    plain, fused = pair({}, dtype)
    latent = LATENT.to(dtype)
    with Wide(torch.float64):
        exact = plain(latent)
    assert fused(latent).dtype == dtype
    assert_parity(fused(latent), same=plain(latent), exact=exact, name=f"fused decoder {dtype}")


def test_the_kernel_has_norms_of_that_width():
    assert fused_decoder.MAX_NORM == conv3x3.MAX_NORM
