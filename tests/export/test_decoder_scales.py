"""Scales of the decoder's INT8 convolutions that come from a calibration's pictures."""

from dataclasses import replace

import pytest
import torch
from tiny_build import RANGES, component, quiet, request, runner, said
from tiny_recipes import recipe

from engines.errors import CheckpointError
from engines.spec import Precision, Target
from export.calibration_data import draw_all, plan_runs
from export.decoder_scales import ConvStatistics
from export.plans import decoder_plan
from export.quantization_request import QuantizationRequest
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.pipeline import SanaReference
from sana_ref.quantized_convs import ConvRanges

CONFIG = AutoencoderDCConfig(
    latent_channels=4,
    encoder_block_out_channels=(8, 8),
    encoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), ()),
    decoder_block_types=("ResBlock", "ResBlock"),
    decoder_block_out_channels=(8, 16),
    decoder_layers_per_block=(1, 2),
    decoder_qkv_multiscales=((), ()),
)
LATENTS = torch.randn(3, 1, 4, 5, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def decoder():
    torch.manual_seed(4)
    return AutoencoderDC(CONFIG).decoder.eval().requires_grad_(False)


def observed(decoder, rows=8):
    with torch.inference_mode(), ConvStatistics(decoder, rows) as seen:
        for latents in LATENTS:
            decoder(latents)
    return seen


def test_statistics_are_those_of_all_runs(decoder):
    seen = observed(decoder)
    with torch.inference_mode(), ConvRanges(decoder) as ranges:
        decoder(LATENTS.flatten(0, 1))
    assert {group: float(each.amax()) for group, each in seen.channels.items()} == pytest.approx(ranges.largest(), rel=1e-5)
    assert {group: torch.cat(each).shape for group, each in seen.pixels.items()} == {
        group: (3 * 8, 8 if group.startswith("up_blocks.0") else 16) for group in seen.channels
    }


@pytest.mark.slow
def test_the_recipes_method_finds_the_scale(decoder):
    """The largest number that was seen becomes 127; with a percentile, some are larger."""
    seen = observed(decoder, 100)
    largest = {group: float(each.amax()) / 127 for group, each in seen.channels.items()}
    plans = [seen.plan("int8", recipe("int8", f"method={method}", "percentile=90")) for method in ("absmax", "percentile")]
    absmax, percentile = ({group: layer.input_scale for group, layer in plan.layers.items()} for plan in plans)
    assert absmax == pytest.approx(largest)
    assert all(0 < percentile[group] < scale / 1.3 for group, scale in largest.items())


@pytest.mark.slow
def test_what_has_no_range(decoder):
    decoder.up_blocks[1][1].conv1.weight.zero_()
    decoder.up_blocks[1][1].conv1.bias.zero_()
    with pytest.raises(CheckpointError, match=r"up_blocks.1.1.conv2, activations: got a range of 0"):
        observed(decoder).plan("int8", recipe())


@pytest.mark.slow
def test_a_build_that_calibrates(tmp_path):
    """Its scales are those of what its sampling runs decode to; they are kept. FP8's are the parity check's, and so are INT8's
    where the denoiser is not calibrated."""
    progress = quiet()
    made = runner(progress=progress)
    asked = QuantizationRequest(recipe=recipe(), name="int8")
    wanted = request(tmp_path / "never", precision=Precision.INT8, targets=(Target.SM80,), quantization=asked)

    def scales(precision: Precision = Precision.INT8, **changes: object) -> dict[str, float]:
        plan = decoder_plan(replace(wanted, **changes), made, component("decoder", precision), RANGES)  # type: ignore[arg-type]
        assert {layer.format for layer in plan.layers.values()} == {str(precision)}
        return {group: layer.input_scale for group, layer in plan.layers.items()}

    pictures = scales()
    assert scales() == pictures
    assert said(progress).count("calibration: decoder") == 1
    noise = scales(quantization=None)
    assert scales(components=("decoder",)) == noise
    # four times over 127; FP8's are eight times over 448
    assert noise == pytest.approx({group: scale / 8 * 448 * 4 / 127 for group, scale in scales(Precision.FP8).items()})
    reference = SanaReference(made.checkpoint)
    runs = draw_all(reference, plan_runs(made.checkpoint, recipe().calibration), made.store, quiet())
    with ConvRanges(reference.decoder) as largest:
        for run in runs:
            reference.decode(run.latents[-1:])
    assert pictures == pytest.approx({group: each / 127 for group, each in largest.largest().items()})
