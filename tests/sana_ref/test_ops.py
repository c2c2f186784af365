"""The op against its own definition in other words, its gradients against finite differences and autograd, and its registration."""

import pytest
import torch

from sana_ref.ops import EPS, relu_linear_attention, relu_linear_attention_truth

HALF = [torch.float16, torch.bfloat16]


def qkv(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def by_pairs(q, k, v, eps=EPS):
    """The same as attention over all pairs of tokens, without a softmax: quadratic, and sharing no step with the truth."""
    weight_NN = torch.einsum("bhnd,bhmd->bhnm", q.clamp(min=0), k.clamp(min=0))
    return torch.einsum("bhnm,bhmd->bhnd", weight_NN, v) / (weight_NN.sum(-1, keepdim=True) + eps)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 17, 8), (3, 2, 64, 32)])
def test_truth_is_attention_over_pairs(shape):
    q, k, v = qkv(shape, torch.float64)
    torch.testing.assert_close(relu_linear_attention(q, k, v), by_pairs(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_state_is_wide(dtype):
    """4096 tokens of ones: a sum in half precision would stop growing at 2048 (fp16) or 256 (bf16)."""
    ones = torch.ones(1, 1, 4096, 16, dtype=dtype)
    assert torch.equal(relu_linear_attention(ones, ones, ones), ones)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_does_not_reach_the_state(dtype):
    q, k, v = (t.requires_grad_() for t in qkv((1, 2, 100, 16), torch.float32))
    plain = relu_linear_attention(q, k, v)
    plain_grads = torch.autograd.grad(plain.square().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=dtype):
        cast = relu_linear_attention(q, k, v)
        cast_grads = torch.autograd.grad(cast.square().sum(), (q, k, v))
    assert torch.equal(plain, cast)
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, cast_grads, strict=True))


def test_eps_decides_where_the_denominator_vanishes():
    q, k, v = qkv((1, 1, 8, 16), torch.float64)
    q, k = q * 1e-8, k * 1e-8  # relu(q) z is then of the order of eps
    assert not torch.allclose(relu_linear_attention(q, k, v, EPS), relu_linear_attention(q, k, v, 2 * EPS), rtol=0.05, atol=0)


def test_nothing_positive_gives_zero_and_zero_gradients():
    q, k, v = (t.requires_grad_() for t in qkv((1, 2, 9, 16), torch.float32))
    for hidden_q, hidden_k in ((-q.abs(), k), (q, -k.abs())):
        out = relu_linear_attention(hidden_q, hidden_k, v)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert torch.equal(out, torch.zeros_like(out))
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 2, 5, 4)])
def test_gradients_by_finite_differences(shape):
    q, k, v = (t.requires_grad_() for t in qkv(shape, torch.float64, seed=1))
    assert torch.autograd.gradcheck(relu_linear_attention, (q, k, v))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_gradients_equal_autograd_of_the_truth(dtype):
    """The explicit backward may err at most twice as much, against float64, as automatic differentiation of the truth."""
    grad, *inputs = (*qkv((2, 3, 200, 32), dtype, seed=3)[:1], *qkv((2, 3, 200, 32), dtype, seed=2))

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    exact = gradients(relu_linear_attention_truth, torch.float64)
    same = gradients(relu_linear_attention_truth, dtype)
    for got, peer, true in zip(gradients(relu_linear_attention, dtype), same, exact, strict=True):
        assert got.dtype == dtype
        bound = 2 * max((peer - true).abs().max().item(), (true.to(dtype) - true).abs().max().item())
        assert (got - true).abs().max().item() <= bound


@pytest.mark.slow
def test_registration():
    """Schema, fake tensors, autograd, and tracing with dynamic shapes."""
    inputs = [t.requires_grad_() for t in qkv((2, 2, 6, 16), torch.float32)]
    torch.library.opcheck(torch.ops.sana.relu_linear_attention.default, tuple(inputs))
    strided = [t.detach().transpose(1, 2) for t in qkv((2, 6, 2, 16), torch.float32)]
    torch.library.opcheck(torch.ops.sana.relu_linear_attention.default, tuple(strided))
    assert relu_linear_attention(*strided).stride() == strided[2].stride()


def test_backward_registration():
    """Schema and fake tensors; gradients are laid out as their inputs are, whole tensors or pieces of one."""
    op = torch.ops.sana.relu_linear_attention_backward.default
    rows = [t.transpose(1, 2) for t in qkv((2, 6, 2, 16), torch.float32)]
    pieces = torch.randn(2, 2, 6, 48).chunk(3, dim=-1)
    for inputs in (qkv((2, 2, 6, 16), torch.float32), rows, pieces):
        grad = torch.ones(()).expand(2, 2, 6, 16)
        torch.library.opcheck(op, (grad, *inputs), test_utils=("test_schema", "test_faketensor"))
        assert [t.stride() for t in op(grad, *inputs)] == [torch.empty_like(t).stride() for t in inputs]


def test_a_compiled_step_has_one_node_each_way():
    """torch.compile gives the gradients of eager mode, with each op whole."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    calls = []

    def note(graph, example_inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if "sana" in str(node.target))
        return make_boxed_func(graph.forward)

    def attention(x, weight):
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (x @ weight).chunk(3, dim=-1))
        return relu_linear_attention(q, k, v).transpose(1, 2).flatten(2).square().sum()

    leaves = [t.requires_grad_() for t in (torch.randn(2, 9, 32), torch.randn(32, 96))]
    compiled = torch.compile(attention, backend=aot_autograd(fw_compiler=note, bw_compiler=note), fullgraph=True)
    wanted, got = (torch.autograd.grad(function(*leaves), leaves) for function in (attention, compiled))
    torch.testing.assert_close(got, wanted)
    assert calls == ["sana.relu_linear_attention.default", "sana.relu_linear_attention_backward.default"]


def test_exports_as_one_node_with_dynamic_batch_and_tokens():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return relu_linear_attention(q, k, v)

    dynamic = {0: torch.export.Dim("batch"), 2: torch.export.Dim("tokens")}
    program = torch.export.export(Attention(), tuple(qkv((2, 2, 6, 16), torch.float32)), dynamic_shapes=(dynamic, dynamic, dynamic))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["sana.relu_linear_attention.default"]
    q, k, v = qkv((3, 2, 31, 16), torch.float32)
    assert torch.equal(program.module()(q, k, v), relu_linear_attention(q, k, v))


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((1, 1, 4, 16), (1, 1, 5, 16)), (torch.float32,) * 2, r"expected one shape \(B, H, N, D\)"),
        (((1, 4, 16), (1, 4, 16)), (torch.float32,) * 2, r"expected one shape \(B, H, N, D\)"),
        (((1, 1, 4, 16), (1, 1, 4, 16)), (torch.float32, torch.bfloat16), "expected one floating dtype"),
        (((1, 1, 4, 16), (1, 1, 4, 16)), (torch.int64,) * 2, "expected one floating dtype"),
    ],
)
def test_bad_arguments(shapes, dtypes, message):
    q, v = (torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    with pytest.raises(ValueError, match=message):
        relu_linear_attention(q, q, v)
