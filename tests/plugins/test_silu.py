"""The forms of SiLU in kernels (interpreted on a CPU, or on a GPU), also of numbers that are large, infinite or none."""

import importlib

import pytest
import torch
from parity.interpreter import interpret
from torch.nn import functional as F

COUNT = 1024
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 88.0, -88.0, 104.0, -104.0, 65504.0, -65504.0, 6e-8, -6e-8)
HUGE = (3e38, -3e38)
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
CASES = [("exact", "fp32"), ("coarse", "fp32"), ("twice", "fp32"), ("twice", "fp16"), ("sixteenth", "fp16"), ("slope", "fp32")]
PARTS = {"twice": 2, "sixteenth": 32}  # of SiLU's argument that a form is given

LAUNCH = """
import triton
import triton.language as tl
from plugins.silu import silu, silu_of_twice, silu_slope, sixteenth_of_silu

@triton.jit
def kernel(x, y, FORM: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    given = tl.load(x + at)
    if FORM == "twice":
        found = silu_of_twice(given)
    elif FORM == "sixteenth":
        found = sixteenth_of_silu(given)
    elif FORM == "slope":
        found = silu_slope(given)
    else:
        found = silu(given, FORM == "coarse")
    tl.store(y + at, found)

def launch(x, y, form):
    kernel[(1,)](x, y, FORM=form, COUNT=x.numel())
"""


def numbers(form, dtype):
    """As the form takes them: special ones, then those where SiLU bends."""
    special = torch.tensor(SPECIAL + (HUGE if dtype == "fp32" else ()))
    return (torch.cat((special, torch.linspace(-30, 30, COUNT - len(special)))) / PARTS.get(form, 1)).to(DTYPES[dtype])


def check(form, x, y):
    """NaN and infinities are PyTorch's; of other results the error is within what PTX says of its instructions, and roundings."""
    assert y.dtype == x.dtype
    x, y = (t.double().cpu() for t in (x, y))
    x *= PARTS.get(form, 1)
    sigmoid, size = x.sigmoid(), x.abs()
    if form == "slope":
        exact = torch.where(x.isinf(), torch.nan, sigmoid * (1 + x * (1 - sigmoid)))  # an infinity times nothing
        exp = size * 2.0**-23 + 2.0**-21  # relative; a rounded argument, and ex2.approx
        bound = sigmoid * (1 + size) * exp
    else:
        exact = F.silu(x)
        if form == "exact":
            bound = exact.abs() * (size * 2.0**-23 + 2.0**-21)
        else:  # tanh.approx, of f16x2 2**-10.987, times half of x
            bound = size / 2 * 2.0**-10.98
    if form == "sixteenth":
        exact, bound = exact / 16, bound / 16
    if form in ("twice", "sixteenth"):
        bound = bound + exact.abs() * 2.0**-11 + 2.0**-25  # results in fp16
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y[y.isinf()], exact[exact.isinf()])
    finite = exact.isfinite()
    bound = bound + 2.0**-126 * (1 + size)  # subnormal numbers become zero
    assert ((y - exact).abs() <= bound)[finite].all()


@pytest.fixture
def launches(tmp_path, monkeypatch):
    (tmp_path / "silu_launch.py").write_text(LAUNCH)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.slow
def test_forms(launches):
    outputs = interpret("silu_launch:launch", [((numbers(*case),), {"form": case[0]}) for case in CASES])
    for (form, dtype), y in zip(CASES, outputs, strict=True):
        x = numbers(form, dtype)
        check(form, x, y)
        with pytest.raises(AssertionError):
            check(form, x, torch.where(y < 0, 0, y))
        with pytest.raises(AssertionError):
            check(form, x, y.nan_to_num(0.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms_on_gpu(launches, case):
    """Where they are assembly."""
    x = numbers(*case).cuda()
    y = torch.full_like(x, torch.nan)
    importlib.import_module("silu_launch").launch(x, y, case[0])
    check(case[0], x, y)
