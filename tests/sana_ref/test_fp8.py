"""FP8 with a scale a row."""

import pytest
import torch

from sana_ref.fp8 import quantize_rows


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
