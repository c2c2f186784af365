"""Variants of the architecture through the whole build: each has something that an export can lose."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_build import PARTS, quiet, request
from tiny_checkpoint import SCM, write_checkpoint

from engines.spec import Precision
from export.build import build
from export.components import decoder, decoder_plugins
from export.onnx_export import export_module
from sana_ref.variants import DC_AE, DC_AE_LITE

pytestmark = pytest.mark.slow

TRANSFORMER = PARTS["transformer"]


def draw(bundle, **options):
    from runtime.engine import SanaEngine

    with SanaEngine(bundle, backend="onnxruntime", progress=False) as engine:
        return engine.generate("a cat", width=64, height=96, **options)[0]


def test_sprint_embeds_the_guidance_scale(tmp_path):
    sprint = replace(TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    model = write_checkpoint(tmp_path / "sprint", **PARTS | {"transformer": sprint}, scheduler=SCM)
    bundle = build(request(tmp_path / "bundle", model=model), quiet()).bundle
    assert bundle.manifest.guidance_embeds
    assert (bundle.manifest.schedule.scheduler, bundle.manifest.schedule.num_inference_steps) == ("scm", 2)
    low, high = (np.asarray(draw(bundle, guidance=guidance)) for guidance in (1.5, 8.0))
    assert np.any(low != high)


def test_positions_follow_the_size(tmp_path):
    """2K and 4K models add a sinusoid over the picture: its extent must not be that of the example that was exported."""
    wide = replace(TRANSFORMER, interpolation_scale=1.0)
    model = write_checkpoint(tmp_path / "wide", **PARTS | {"transformer": wide})
    build(request(tmp_path / "bundle", model=model, components=("denoiser",)), quiet())


def test_a_decoder_of_residual_blocks(tmp_path):
    lite = replace(PARTS["vae"], decoder_block_types="ResBlock", upsample_block_type="pixel_shuffle", decoder_conv_act_fn="silu")
    model = write_checkpoint(tmp_path / "lite", **PARTS | {"vae": lite})
    bundle = build(request(tmp_path / "bundle", model=model, components=("decoder",)), quiet()).bundle
    assert bundle.manifest.plugins == {"decoder": {"Conv3x3": 6, "Conv3x3Norm": 5, "Conv3x3Upsample": 5}}


def test_a_decoder_that_ends_in_a_norm_and_a_convolution(tmp_path):
    """As DC-AE's own; sana-tiny's ends in an upsampling one."""
    full = replace(
        PARTS["vae"], decoder_layers_per_block=(1,) * 6, decoder_block_types="ResBlock", decoder_qkv_multiscales=((),) * 6
    )
    model = write_checkpoint(tmp_path / "full", **PARTS | {"vae": full})
    bundle = build(request(tmp_path / "bundle", model=model, components=("decoder",)), quiet()).bundle
    counts = {"Conv3x3": 7, "Conv3x3Norm": 6, "Conv3x3Upsample": 5, "NormedTaps": 1, "TapSum": 1}
    assert bundle.manifest.plugins == {"decoder": counts}


def test_a_decoder_whose_last_block_is_wider_than_the_norms_of_the_convolutions_kernel(tmp_path):
    wide = replace(
        PARTS["vae"],
        decoder_block_types="ResBlock",
        decoder_qkv_multiscales=((),) * 6,
        decoder_block_out_channels=(32, 32, 32, 32, 128, 512),
    )
    model = write_checkpoint(tmp_path / "wide", **PARTS | {"vae": wide})
    bundle = build(request(tmp_path / "bundle", model=model, components=("decoder",)), quiet()).bundle
    assert bundle.manifest.plugins == {"decoder": {"Conv3x3": 7, "Conv3x3Norm": 4, "Conv3x3Upsample": 5}}


@pytest.mark.parametrize(
    ("config", "plugins"),
    [
        (
            DC_AE,
            {"Conv3x3": 13, "Conv3x3Norm": 6, "Conv3x3Upsample": 5, "NormedTaps": 1, "TapSum": 1}
            | dict.fromkeys(("GatedDepthwiseConv", "LinearAttentionApply", "LinearAttentionState", "MultiscaleProjection"), 9),
        ),
        (DC_AE_LITE, {"Conv3x3": 38, "Conv3x3Norm": 3, "Conv3x3Upsample": 5}),
    ],
    ids=["full", "lite"],
)
def test_published_decoders(config, plugins):
    assert decoder_plugins(config, fused=True) == plugins
    part = decoder(config, Precision.BF16)
    export_module(part.module, part.spec)  # raises for other numbers of nodes
