"""Weights in 4 or 8 bits: how far they may be off, what they weigh, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import CheckpointError, SpecError
from sana_ref import weight_only
from sana_ref.quantize_ops import FP8_MAX, INT8_MAX
from sana_ref.weight_only import (
    INT4_LEAST,
    INT4_MAX,
    WEIGHT_FORMATS,
    block_of,
    pack_int4,
    pack_weight,
    quantizable,
    role_of,
    unpack_int4,
)

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # and half of a unit in the last place, of the number


@st.composite
def weights(draw):
    """Normal numbers, rows of unlike size, some zeros and an outlier."""
    rows, depth = draw(st.integers(1, 9)), draw(st.sampled_from([16, 32, 48, 64, 128, 192]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, depth, generator=generator) * torch.logspace(-2, 0, rows)[:, None]
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    weight[0, draw(st.integers(0, depth - 1))] = draw(st.sampled_from([1.0, -1.0, 5.0, -30.0]))
    if rows > 1 and draw(st.booleans()):
        weight[-1] = 0
    return weight


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(WEIGHT_FORMATS), st.sampled_from([*DTYPES]))
def test_the_nearest_number_is_taken(weight, kind, dtype):
    """What is off is half a step, a number that is past the largest, and the rounding to the component's type."""
    packed = pack_weight(weight, kind, "w", dtype)
    weight = weight.to(dtype).float()
    scale = (
        packed.scale.float()[..., None].expand(*packed.scale.shape, weight.numel() // packed.scale.numel()).reshape(weight.shape)
    )
    assert (packed.scale > 0).all()
    assert packed.scale.dtype == dtype
    least, largest = {"int4": (INT4_LEAST, INT4_MAX), "int8": (-INT8_MAX, INT8_MAX), "fp8": (-FP8_MAX, FP8_MAX)}[kind]
    half_step = scale / 2 if kind != "fp8" else weight.abs() / 16 + scale * 2.0**-10
    cut_off = (weight - (weight / scale).clamp(least, largest) * scale).abs()
    real = packed.real().float()
    slack = 1e-5 * weight.abs() + 2.0**-24
    assert ((real - weight).abs() <= half_step + cut_off + real.abs() * DTYPES[dtype] + slack).all()
    assert (real[weight == 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(weights())
def test_int4_scales_lose_no_more_than_the_largest_number_s_does(weight):
    weight = weight.bfloat16().float()
    packed = pack_weight(weight, "int4", "w", torch.bfloat16)
    blocks = weight.unflatten(1, (packed.scale.shape[1], -1))
    scale = (blocks.abs().amax(-1) / INT4_MAX).clamp(min=2.0**-126).bfloat16().float()[..., None]
    plain = (blocks / scale).round().clamp(INT4_LEAST, INT4_MAX) * scale
    real = unpack_int4(packed.numbers).unflatten(1, (packed.scale.shape[1], -1)) * packed.scale.float()[..., None]

    def lost(values):
        return (values - blocks).square().sum(-1)

    assert (lost(real) <= lost(plain) * (1 + 1e-6)).all()


def test_clipping_pays_for_normal_numbers():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    searched = pack_weight(weight, "int4", "w", torch.bfloat16).real().float()
    scale = (weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / INT4_MAX).expand(-1, -1, 64).flatten(1)
    plain = (weight / scale).round() * scale
    assert (searched - weight).square().sum() < 0.95 * (plain - weight).square().sum()


@settings(max_examples=20, deadline=None)
@given(weights(), st.sampled_from(WEIGHT_FORMATS), st.integers(1, 300))
def test_rows_do_not_know_of_each_other(weight, kind, chunk):
    """However many are worked on at once."""
    whole = pack_weight(weight, kind, "w", torch.bfloat16)
    before, weight_only._CHUNK = weight_only._CHUNK, chunk
    try:
        parts = pack_weight(weight, kind, "w", torch.bfloat16)
    finally:
        weight_only._CHUNK = before
    assert torch.equal(whole.numbers.view(torch.uint8), parts.numbers.view(torch.uint8))
    assert torch.equal(whole.scale, parts.scale)


@given(st.lists(st.integers(INT4_LEAST, INT4_MAX), min_size=8, max_size=8))
def test_int4_numbers_come_back(numbers):
    tensor = torch.tensor(numbers, dtype=torch.int8).view(2, 4)
    assert torch.equal(unpack_int4(pack_int4(tensor)), tensor.float())
    assert int(pack_int4(torch.tensor([[-8, 7]], dtype=torch.int8))) == 0x78  # as ONNX has it: the first in the lower bits


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 0.5 + 1 / 256), ("fp8", 0.5 + 1 / 256), ("int4", 0.25 + 1 / 128)])
def test_bytes(kind, ratio):
    weight = torch.randn(8, 256)
    assert pack_weight(weight, kind, "w", torch.bfloat16).num_bytes() == ratio * 2 * weight.numel()


@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
@pytest.mark.parametrize(
    ("row", "value", "words"),
    [
        (3, float("nan"), r"weight 'layers\.1\.up', row 3: got a range of nan; expected finite numbers"),
        (2, float("-inf"), r"weight 'layers\.1\.up', row 2: got a range of inf; expected finite numbers"),
        (slice(None), 0.0, r"weight 'layers\.1\.up': got zeros alone in all of 4 rows"),
    ],
)
def test_weights_that_no_scale_can_be_made_of(kind, row, value, words):
    weight = torch.randn(4, 64)
    weight[row] = value
    with pytest.raises(CheckpointError, match=words):
        pack_weight(weight, kind, "layers.1.up", torch.bfloat16)


def test_what_overflows_the_component_s_type_is_named():
    with pytest.raises(CheckpointError, match="row 1: got a range of inf"):
        pack_weight(torch.tensor([[1.0], [1e5]]), "int8", "w", torch.float16)


def test_blocks():
    assert [block_of(depth, "w") for depth in (2304, 192, 96, 48)] == [128, 64, 32, 16]
    with pytest.raises(
        SpecError, match=r"w: got int4 for a depth of 40; expected a multiple of 16, which share a scale\. Use int8"
    ):
        block_of(40, "w")


def test_names():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(3, 2)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)])
            del self.layers[2].weight  # as a part of a model has it

    assert quantizable(Model()) == ["embed.weight", "layers.0.weight"]
    assert role_of("encoder.layers.3.mlp.up_proj.weight") == "mlp.up_proj"
    assert role_of("encoder.embed_tokens.weight") == "embed_tokens"
    assert role_of("transformer.transformer_blocks.0.attn2.to_k.weight") == "attn2.to_k"
