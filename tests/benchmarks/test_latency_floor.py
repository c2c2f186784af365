"""The floor of a step: what is counted."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import operator_flops
from benchmarks.latency_floor import decoder_flops, products, residual_flops, traffic_bytes
from sana_ref.autoencoder import AutoencoderDC
from sana_ref.build import empty
from sana_ref.quantized_convs import conv_group
from sana_ref.variants import DC_AE, VARIANTS

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
