"""The norm's kernels, run by Triton's interpreter on a CPU, against the reference norm."""

from __future__ import annotations

import pytest
from parity.interpreter import run_interpreted

CODE = """
import torch
import train.autoencoder.fast_norm as fast_norm
from parity.interpreter import make_language_ready_once
from sana_ref.layers import RMSNorm

make_language_ready_once()
fast_norm.MAX_PROGRAMS = 3  # several rounds of the backward kernel's loop
torch.manual_seed(0)
for channels, sides in ((64, (7, 9)), (224, (3, 11)), (24, (1, 1))):
    norm = RMSNorm(channels, bias=True, axis=1)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(3, channels, *sides).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)
    leaves = (x, norm.weight, norm.bias)
    wanted = norm(x)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad)
    fast_norm.install(norm)
    got = norm(x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), wanted_grads, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.slow
def test_the_kernels_equal_the_reference() -> None:
    run_interpreted(CODE)
