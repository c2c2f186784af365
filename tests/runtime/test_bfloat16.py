import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from runtime.bfloat16 import from_bfloat16, to_bfloat16


@given(arrays(np.float32, (2, 3), elements=st.floats(width=32, allow_nan=False)))
def test_rounds_as_pytorch_does(array):
    bits = to_bfloat16(array)
    expected = torch.from_numpy(array).bfloat16()
    np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(from_bfloat16(bits), expected.float().numpy())


def test_the_ties_and_any_strides():
    array = np.array([[1 + 2**-8, 1 + 3 * 2**-8], [-1 - 2**-8, 0.0]], np.float32).T
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(array)), [[1, -1], [1 + 2**-6, 0]])
