"""The norm's kernels, run by Triton's interpreter on a CPU, against the reference norm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import torch
import train.tiny.fast_norm as fast_norm
from sana_ref.layers import RMSNorm

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


CHECK = """
import torch
import train.tiny.fast_norm as fast_norm
from train.tiny.fast import check_kernels
from train.tiny.loop import Log

log = Log()
check_kernels(torch.device("cpu"), log)
assert len(log.lines) == 2
fast_norm._fast = lambda norm, x: 1.1 * x * norm.weight[:, None, None] + norm.bias[:, None, None]
try:
    check_kernels(torch.device("cpu"), log)
except RuntimeError as error:
    assert "norm: got a kernel that differs" in str(error)
else:
    raise AssertionError("a wrong kernel passed")
"""


@pytest.mark.parametrize("code", [CODE, CHECK], ids=["kernels equal the reference", "the check sees a wrong kernel"])
def test_in_the_interpreter(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
