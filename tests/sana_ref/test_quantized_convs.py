"""The simulation of the decoder's FP8 and INT8: which convolutions it sees, what they compute, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from engines.errors import CheckpointError, SpecError
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.fused_decoder import FusedDecoder
from sana_ref.quantization import LayerPlan, QuantizationPlan
from sana_ref.quantize_ops import quantize_weight, round_static
from sana_ref.quantized_convs import MARGINS, ConvRanges, QuantizedConvs, conv_groups, conv_plan

SMALL = AutoencoderDCConfig(
    latent_channels=4,
    attention_head_dim=16,
    encoder_block_out_channels=(8, 8),
    encoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), ()),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_out_channels=(8, 16, 32),
    decoder_layers_per_block=(1, 2, 1),
    decoder_qkv_multiscales=((), (), ()),
)
GROUPS = [f"up_blocks.{block}.conv{conv}" for block in ("0.1", "1.1", "1.2") for conv in (1, 2)]
LATENT = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def decoder():
    """In fp32, with random weights."""
    torch.manual_seed(4)
    return AutoencoderDC(SMALL).decoder.eval().requires_grad_(False)


def ranges_of(decoder, run=None):
    with torch.inference_mode(), ConvRanges(decoder) as found:
        (run or decoder)(LATENT)
    return found.largest()


def test_groups_are_the_residual_blocks_convolutions(decoder):
    assert conv_groups(name for name, _ in decoder.named_parameters()) == {name: [f"{name}.weight"] for name in GROUPS}


def test_a_fused_decoder_has_the_same_ranges(decoder):
    ranges = ranges_of(decoder)
    assert [*ranges] == [*GROUPS[2:], *GROUPS[:2]]  # the finest stage is the last
    assert ranges_of(decoder, FusedDecoder(decoder)) == pytest.approx(ranges, rel=1e-5)
    for kind, largest in (("fp8", 448), ("int8", 127)):
        plan = conv_plan(kind, ranges, 3.0)
        assert {layer.format for layer in plan.layers.values()} == {kind}
        assert all(layer.input_scale == pytest.approx(3 * ranges[group] / largest) for group, layer in plan.layers.items())


def test_ranges_are_those_of_all_runs(decoder):
    with torch.inference_mode(), ConvRanges(decoder) as found:
        for factor in (1, 3, 2):
            decoder(LATENT * factor)
    with torch.inference_mode(), ConvRanges(decoder) as largest:
        decoder(LATENT * 3)
    assert found.largest() == largest.largest()


@pytest.mark.parametrize("kind", MARGINS)
def test_what_a_group_computes(decoder, kind):
    """One group alone: its convolution, of rounded numbers. All others are as they were."""
    conv, scale = decoder.up_blocks[1][1].conv1, 0.25
    x = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(2))
    plan = QuantizationPlan(layers={"up_blocks.1.1.conv1": LayerPlan(format=kind, input_scale=scale)})
    weight = quantize_weight(conv.weight.flatten(1), kind, "weight").real().view(conv.weight.shape)
    with torch.inference_mode(), QuantizedConvs(decoder, plan):
        got, other = conv(x), decoder.up_blocks[1][1].conv2(x)
        half = F.conv2d(x.bfloat16(), conv.weight, conv.bias, padding=1)
    expected = F.conv2d(round_static(x, kind, scale), weight, conv.bias, padding=1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(other, decoder.up_blocks[1][1].conv2(x))
    assert half.dtype == torch.bfloat16
    assert (got - conv(x)).abs().max() > 1e-3


def test_int8_has_no_least_number(decoder):
    """-128, which kernels have not: what would be it is -127."""
    conv = decoder.up_blocks[1][1].conv1
    plan = QuantizationPlan(layers={"up_blocks.1.1.conv1": LayerPlan(format="int8", input_scale=0.5)})
    x = torch.full((1, 16, 3, 3), 100.0)
    with torch.inference_mode(), QuantizedConvs(decoder, plan):
        bias = conv(torch.zeros_like(x))
        torch.testing.assert_close(conv(-x) - bias, bias - conv(x))


@pytest.mark.parametrize("kind", MARGINS)
def test_both_decoders_compute_it(decoder, kind):
    """But for what the fused one does not round; in fp32 that is nothing but the order of sums, which may turn a rounding."""
    plan = conv_plan(kind, ranges_of(decoder), MARGINS[kind])
    with torch.inference_mode():
        exact = decoder(LATENT)
        with QuantizedConvs(decoder, plan):
            one, other = decoder(LATENT), FusedDecoder(decoder)(LATENT)
    error = (one - exact).square().mean().sqrt()
    assert error > 1e-4
    assert (one - other).square().mean().sqrt() < error / 2


def test_a_group_that_stays(decoder):
    plan = QuantizationPlan(layers={group: LayerPlan(format="none") for group in GROUPS})
    with torch.inference_mode():
        plain = decoder(LATENT)
        with QuantizedConvs(decoder, plan):
            assert torch.equal(decoder(LATENT), plain)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"up_blocks.1.3.conv1": LayerPlan(format="fp8", input_scale=1.0)}, r"got the group 'up_blocks.1.3.conv1'; did you mean"),
        ({GROUPS[0]: LayerPlan(format="fp8")}, f"plan, {GROUPS[0]}: got .*; expected fp8 or int8 with an input_scale"),
        ({GROUPS[0]: LayerPlan(format="nvfp4", input_scale=1.0)}, f"plan, {GROUPS[0]}: got .*nvfp4.*; expected fp8 or int8"),
    ],
)
def test_plans_that_do_not_fit(decoder, layers, words):
    with pytest.raises(SpecError, match=words):
        QuantizedConvs(decoder, QuantizationPlan(layers=layers))


def test_what_has_no_range(decoder):
    ranges = ranges_of(decoder)
    decoder.up_blocks[0][1].conv1.weight.zero_()
    with pytest.raises(CheckpointError, match=r"up_blocks.0.1.conv1.weight: got a range of 0; expected a finite number"):
        QuantizedConvs(decoder, conv_plan("fp8", ranges, 1.0))
    with pytest.raises(CheckpointError, match=r"up_blocks.0.1.conv1: got no activations"):
        ConvRanges(decoder).largest()
    decoder.up_blocks[1][1].conv1.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"up_blocks.1.1.conv2, activations: got a range of nan"):
        ranges_of(decoder)
