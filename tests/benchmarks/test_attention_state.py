"""The attention that can round its state: with nothing rounded it is the reference's, tile by tile as at once."""

import pytest
import torch

from benchmarks.attention_state import attention, quantized_state
from sana_ref import ops


def draw(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 40, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize("tile", [None, 16, 7, 64])
def test_with_nothing_rounded_it_is_the_reference(tile):
    q, k, v = draw(0)
    exact = ops.relu_linear_attention_truth(q.double(), k.double(), v.double())
    same = (ops.relu_linear_attention_truth(q, k, v) - exact).abs().max()
    with quantized_state("int8", (), tile):
        got = ops.relu_linear_attention(q, k, v)
    assert (got - exact).abs().max() <= 4 * same  # sums of tiles round once more


def test_only_what_is_named_is_rounded_and_the_op_comes_back():
    q, k, v = draw(1)
    seen = []
    attention(q, k, v, state=lambda x: seen.append(x.shape) or x, normaliser=lambda x: seen.append(x.shape) or x, tile=20)
    assert seen == [(2, 3, 8, 8), (2, 3, 1, 8)] * 2
    original = ops.relu_linear_attention
    exact = original(q, k, v)
    with quantized_state("fp8", ("state",)):
        state = ops.relu_linear_attention(q, k, v)
    with pytest.raises(KeyError), quantized_state("fp8", ("state",)):
        raise KeyError
    assert ops.relu_linear_attention is original
    assert 0 < (state - exact).square().mean() < 0.01 * exact.square().mean()
