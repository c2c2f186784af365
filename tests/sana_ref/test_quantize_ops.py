"""Numbers in 8 and 4 bits: against ml_dtypes, which has the formats, and against the bounds that they imply."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engines.errors import CheckpointError
from sana_ref.quantize_ops import (
    BLOCK,
    E2M1,
    FP8_MAX,
    INT8_MAX,
    NVFP4_RANGE,
    quantize_weight,
    round_dynamic,
    round_nvfp4,
    round_static,
    unpack_e2m1,
)

KINDS = ("int8", "fp8")
ARRAYS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([16, 48])),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)
SCALES = st.floats(2.0**-10, 2.0**6, width=32)
QUICK = settings(max_examples=60, deadline=None)


def step(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Half of the distance between neighbours of a number: how far rounding may move it."""
    if kind == "int8":
        return torch.full_like(x, 0.5)
    if kind == "fp8":  # three bits of mantissa; below 2^-6 the distance is 2^-9
        return torch.exp2(x.abs().clamp(min=2.0**-6).log2().floor()) / 16
    return torch.where(x.abs() < 2, 0.25, torch.where(x.abs() < 4, 0.5, 1.0))


@pytest.mark.parametrize("kind", KINDS)
@given(x=ARRAYS, scale=SCALES)
@QUICK
def test_static(kind, x, scale):
    """As the formats round, idempotent, and no further off than half a step where nothing is cut off."""
    x = torch.from_numpy(x)
    got = round_static(x, kind, scale)
    ratio = (x / np.float32(scale)).numpy()
    limited = np.clip(np.rint(ratio), -128, 127) if kind == "int8" else np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(got.numpy(), limited.astype(np.float32) * np.float32(scale))
    torch.testing.assert_close(round_static(got, kind, scale), got, rtol=0, atol=0)
    inside = torch.from_numpy(np.abs(ratio)) <= (INT8_MAX if kind == "int8" else FP8_MAX)
    error = (got - x).abs() / scale
    assert (error <= step(torch.from_numpy(ratio), kind) * (1 + 1e-5))[inside].all()


@pytest.mark.parametrize("kind", KINDS)
@given(x=ARRAYS)
@QUICK
def test_dynamic(kind, x):
    """A row's largest number stays what it is, and no number moves by more than half a step."""
    x = torch.from_numpy(x)
    got, largest = round_dynamic(x, kind), x.abs().amax(-1, keepdim=True)
    scale = (largest / (INT8_MAX if kind == "int8" else FP8_MAX)).clamp(min=2.0**-126)
    torch.testing.assert_close(got.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=1e-30)
    assert ((got - x).abs() <= step(x / scale, kind) * scale * (1 + 1e-5) + 1e-37).all()


@given(x=ARRAYS)
@QUICK
def test_nvfp4(x):
    """The definition, with ml_dtypes' roundings."""
    if 0 < np.abs(x).max() < 1e-30:  # the scale would be no normal number, which NumPy and PyTorch divide by differently
        return
    scale = np.float32(np.abs(x).max() / NVFP4_RANGE or 1e-3)
    blocks = x.reshape(len(x), -1, BLOCK)
    ratio = np.minimum(np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / scale, np.float32(448))
    block_scale = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    scaled = np.divide(blocks, block_scale, out=np.zeros_like(blocks), where=block_scale > 0)
    wanted = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * block_scale
    got = round_nvfp4(torch.from_numpy(x), float(scale))
    np.testing.assert_array_equal(got.numpy(), wanted.reshape(x.shape))


@given(x=ARRAYS)
@QUICK
def test_weights_in_four_bits(x):
    """The tensor's scale makes the largest block scale 448; numbers survive packing; half a step of a block is the bound."""
    weight = torch.from_numpy(x)
    if np.abs(x).max() < 1e-30:  # the scale would be no normal number
        return
    found = quantize_weight(weight, "nvfp4", "w")
    assert (found.numbers.dtype, found.numbers.shape) == (torch.uint8, (len(x), x.shape[1] // 2))
    assert float(found.block_scale.float().amax()) == 448
    torch.testing.assert_close(found.real(), round_nvfp4(weight, float(found.scale)), rtol=0, atol=0)
    size = (found.block_scale.float() * found.scale)[..., None]
    blocks = weight.unflatten(1, (-1, BLOCK))
    cut = (blocks.abs() - 6 * size).clamp(min=0)  # a block scale is rounded too, so that the largest may be cut
    error = (found.real() - weight).abs().unflatten(1, (-1, BLOCK))
    bound = torch.where(size > 0, step(blocks / size.clamp(min=1e-38), "nvfp4") * size, blocks.abs())
    assert (error <= (bound + cut) * (1 + 1e-5)).all()


def test_bits_of_e2m1():
    """ONNX's and TensorRT's codes: three bits of E2M1's table, and the sign; the first of two numbers in the lower bits."""
    numbers = np.array([*E2M1, *(-number for number in E2M1)], np.float32)
    codes = numbers.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = torch.from_numpy(codes[0::2] | codes[1::2] << 4)[None]
    np.testing.assert_array_equal(unpack_e2m1(packed)[0].numpy(), numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_eight_bits(kind):
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    weight[2] = 0
    found = quantize_weight(weight.half(), kind, "w")
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    assert found.numbers.itemsize == 1
    assert (found.numbers.float().abs().amax(-1) == torch.tensor([largest, largest, 0, largest, largest])).all()
    again = quantize_weight(found.real(), kind, "w", found.scale)
    assert torch.equal(again.numbers.float(), found.numbers.float())
    given = quantize_weight(weight, kind, "w", torch.full((5,), 0.5))
    assert (given.real().abs() <= 0.5 * largest).all()
    assert (given.numbers.float()[4].abs().amax()) == largest  # a row that the scale cuts off
    torch.testing.assert_close(given.real()[1], weight[1], rtol=0.07, atol=0.25)


@pytest.mark.parametrize("kind", [*KINDS, "nvfp4"])
@pytest.mark.parametrize(("bad", "words"), [(0.0, "range of 0"), (float("inf"), "range of inf"), (float("nan"), "range of nan")])
def test_weights_without_a_range(kind, bad, words):
    weight = torch.full((2, 16), bad) if bad == 0 else torch.ones(2, 16)
    weight[1, 3] = bad
    with pytest.raises(CheckpointError, match=f"blocks.7.ff: got a {words}; expected a finite number above 0"):
        quantize_weight(weight, kind, "blocks.7.ff")


def test_zeros_stay():
    zeros = torch.zeros(2, 16)
    for rounded in (*(round_static(zeros, kind, 0.1) for kind in KINDS), *(round_dynamic(zeros, kind) for kind in KINDS)):
        assert torch.equal(rounded, zeros)
    assert torch.equal(round_nvfp4(zeros, 0.1), zeros)
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_weight(torch.ones(2, 24), "nvfp4", "w")
