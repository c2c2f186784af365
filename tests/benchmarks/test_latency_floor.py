"""The floor of a step: what is counted."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import latency_floor
from benchmarks.flops import operator_flops
from benchmarks.latency_floor import (
    decoder_floor,
    decoder_flops,
    decoder_traffic_bytes,
    floor_of,
    products,
    residual_flops,
    traffic_bytes,
)
from benchmarks.latency_work import Work
from engines.spec import Precision
from sana_ref.autoencoder import AutoencoderDC
from sana_ref.build import empty
from sana_ref.quantized_convs import conv_group
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.variants import DC_AE, DC_AE_LITE, VARIANTS

CONFIG = replace(VARIANTS["sana_1600m_1024px"].transformer, num_layers=2)


def test_products_are_those_of_a_forward_pass():
    """But for the text's, which a step does not have, the embeddings, and the last projection."""
    cells, texts, tokens = 32, 2, 300
    rows = texts * cells * cells
    found = CONFIG.num_layers * sum(2 * p.rows * p.columns * p.depth for p in products(CONFIG, rows))
    counted = operator_flops(CONFIG, batch=texts, height=cells, width=cells, tokens=tokens)
    text = 2 * texts * tokens * (CONFIG.caption_channels + CONFIG.dim + 2 * CONFIG.num_layers * CONFIG.dim) * CONFIG.dim
    depthwise = CONFIG.num_layers * 2 * rows * 9 * 2 * int(CONFIG.mlp_ratio * CONFIG.dim)
    linear = sum(count for name, count in counted.items() if name.split(".")[-1] in ("addmm", "mm", "convolution"))
    assert found == pytest.approx(linear - text - depthwise, rel=0.01)


def test_traffic_grows_with_tokens():
    assert traffic_bytes(CONFIG, 2048) == 2 * traffic_bytes(CONFIG, 1024)
    assert traffic_bytes(CONFIG, 2048) == 2048 * 2 * (17 * 2240 + 3 * 5600)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_traffic_in_8_bits(precision):
    """By hand, bytes of a token's channel: what a product reads has one, and the first sum is written in both formats."""
    attention = 2 + 2 + 2 + 1  # k, v, q; out
    first_sum = 2 + 2 + 2 + 1
    text = 2 + 1  # q; out
    norm = 2 + 2 + 2 + 1  # x, branch; sum, normed
    middle = 2 * 2 + 1  # of E
    found = traffic_bytes(CONFIG, 2048, precision)
    assert found == 2048 * ((attention + first_sum + text + 2 * norm) * 2240 + middle * 5600)
    assert found < traffic_bytes(CONFIG, 2048)


def flops_of(products):
    return sum(2 * times * each.rows * each.columns * each.depth for each, _, times in products)


@pytest.mark.slow
@pytest.mark.parametrize("component", ["denoiser", "decoder"])
@pytest.mark.parametrize("precision", [each for each in Precision if each != Precision.NVFP4])
def test_every_precision_has_a_floor(monkeypatch, precision, component):
    """On tensors without memory."""

    class OnMeta:
        def __getattr__(self, name):
            found = getattr(torch, name)
            if name not in ("randn", "zeros", "ones", "randint"):
                return found
            return lambda *size, device=None, **more: found(*size, device="meta", **more)

    monkeypatch.setattr(latency_floor, "torch", OnMeta())
    monkeypatch.setattr(latency_floor, "captured", lambda calls: calls)
    checkpoint = SimpleNamespace(transformer_config=CONFIG, vae_config=DC_AE)
    work = Work(component=component, width=1024, height=1024, batch=1, steps=1)
    found = floor_of(checkpoint, work, precision)
    calls = found.task().call
    assert len(calls) == sum(times for _, _, times in found.products) > 0
    assert len({id(call) for call in calls}) == len(found.products)  # so many operands are in memory
    flops = {kind: flops_of([each for each in found.products if each[1] == kind]) for _, kind, _ in found.products}
    narrow = precision in ("fp8", "int8")
    if component == "denoiser":
        assert found.traffic_bytes == CONFIG.num_layers * traffic_bytes(CONFIG, 2048, precision)
        assert list(flops) == ["fp16" if precision == "fp32" else precision]
        return
    size = {"width": 1024, "height": 1024, "batch": 1}
    residual = residual_flops(DC_AE, **size) if narrow else 0
    half = "fp16" if precision in ("fp16", "fp32") else "bf16"
    assert flops[half] == pytest.approx(decoder_flops(DC_AE, **size) - residual, rel=0.01)
    assert flops.get(precision, 0) == pytest.approx(residual, rel=0.01) or not narrow
    assert found.traffic_bytes == decoder_traffic_bytes(DC_AE, **size)


def test_floor_of_a_text():
    """Products by what PyTorch counts of the trunk; traffic by hand, in numbers of a token in a layer."""
    config = replace(Gemma2Config(), num_hidden_layers=2)
    checkpoint = SimpleNamespace(text_encoder_config=config)
    found = floor_of(checkpoint, Work(component="text_encoder", width=0, height=0, batch=2), "bf16", tokens=300)
    with FlopCounterMode(display=False) as counter:
        trunk = empty(lambda: Gemma2Encoder(config))
        trunk(torch.zeros(2, 300, dtype=torch.int64, device="meta"), torch.ones(2, 300, dtype=torch.int64, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for operator, count in counts.items() if str(operator) in ("aten.mm", "aten.addmm"))
    assert flops_of(found.products) == linear > 0
    qkv, out, norm, middle = (8 + 2 * 4) * 256, 8 * 256, 4 * 2304, 3 * 9216
    assert found.traffic_bytes == 2 * 2 * 300 * 2 * (qkv + out + 2 * norm + middle)


def test_what_has_no_floor():
    checkpoint = SimpleNamespace(transformer_config=CONFIG, vae_config=DC_AE)
    for component, precision in (("denoiser", "nvfp4"), ("picture", "fp16")):
        assert floor_of(checkpoint, Work(component=component, width=512, height=512, batch=1, steps=1), precision) is None


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 64, 256, 1024, 4096])
def test_small_and_large_decodes_have_their_flops(side):
    flops = flops_of(decoder_floor(DC_AE, width=side, height=side).products)
    assert flops == pytest.approx(decoder_flops(DC_AE, width=side, height=side, batch=1), rel=0.01)


def test_flops_of_the_decoder():
    """8.4 TFLOP at 1024 px, and in proportion to the pixels."""
    small, large = (decoder_flops(DC_AE, width=side, height=side, batch=1) for side in (512, 1024))
    assert large == pytest.approx(8.4e12, rel=0.03)
    assert large == pytest.approx(4 * small, rel=0.001)


def test_flops_of_residual_blocks():
    """Those of the convolutions that FP8 is of."""
    decoder = empty(lambda: AutoencoderDC(DC_AE)).decoder
    with FlopCounterMode(display=False) as counter:
        decoder(torch.empty(2, DC_AE.latent_channels, 4, 6, device="meta"))
    by_module = counter.get_flop_counts()
    found = {name: sum(counts.values()) for name, counts in by_module.items() if conv_group(f"{name}.weight")}
    assert len(found) == 18
    assert sum(found.values()) == residual_flops(DC_AE, width=6 * 32, height=4 * 32, batch=2)


def test_traffic_of_the_decoder():
    """By hand, of each stage from the finest, in channels of a pixel; and in proportion to the pixels."""
    assert DC_AE.decoder_block_out_channels == (128, 256, 512, 512, 1024, 1024)
    assert DC_AE.decoder_layers_per_block == (3,) * 6
    norm, state, second_scale, middle = 3, 4, 6, 12
    attention = 2 * state + second_scale + middle + 2 * norm
    blocks = 3 * sum(
        width * side**2 * block
        for width, side, block in (
            (128, 1024, norm),
            (256, 512, norm),
            (512, 256, norm),
            (512, 128, attention),
            (1024, 64, attention),
            (1024, 32, attention),
        )
    )
    shortcuts = sum(
        2 * wide * (2 * side) ** 2 + narrow * side**2
        for wide, narrow, side in ((128, 256, 512), (256, 512, 256), (512, 512, 128), (512, 1024, 64), (1024, 1024, 32))
    )
    last = 2 * 128 * 1024**2
    found = decoder_traffic_bytes(DC_AE, width=1024, height=1024, batch=1)
    assert found == 2 * (blocks + shortcuts + last)
    assert decoder_traffic_bytes(DC_AE, width=2048, height=1024, batch=2) == 4 * found


def test_traffic_of_a_decoder_without_layers_at_full_resolution():
    """It upsamples behind its last norm, without a shortcut: neither is at 1024 px."""
    deep = replace(DC_AE_LITE, decoder_layers_per_block=(1, *DC_AE_LITE.decoder_layers_per_block[1:]))
    wide, finest = DC_AE_LITE.decoder_block_out_channels[1], DC_AE_LITE.decoder_block_out_channels[0]
    lite, more = (decoder_traffic_bytes(config, width=1024, height=1024, batch=1) for config in (DC_AE_LITE, deep))
    block, shortcut = 3 * finest * 1024**2, 2 * finest * 1024**2 + wide * 512**2
    assert more - lite == 2 * (block + shortcut + 2 * finest * 1024**2 - 2 * wide * 512**2)
