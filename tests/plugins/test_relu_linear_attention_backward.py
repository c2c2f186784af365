"""The gradient's kernels (interpreted on a CPU, or on a GPU) against automatic differentiation of the truth in float64."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from parity.bound import assert_parity
from parity.interpreter import run_interpreted
from torch import Tensor

from sana_ref import ops

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = 3


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # (B, H, N, D)
    dtype: str
    layout: str = "contiguous"
    sign: str = "any"
    scale: float = 1.0
    eps: float = ops.EPS
    split: int | None = None  # tokens a program; None: as planned

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """grad, q, k, v in the layout and dtype of the case."""
        generator = torch.Generator().manual_seed(0)
        grad, q, k, v = (torch.randn(self.shape, generator=generator).to(DTYPES[self.dtype]) for _ in range(4))
        q, k, v = q * self.scale, k * self.scale, v + 1  # a mean in v: g S^T and c z then nearly cancel
        q, k = (-q.abs() if self.sign == "no q" else q), (-k.abs() if self.sign == "no k" else k)
        if self.layout == "rows":  # as from linear layers: (B, N, H D)
            grad, q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (grad, q, k, v))
        elif self.layout == "chunks":  # as in the autoencoder: channels of one map, tokens side by side; grad of a sum
            packed = torch.cat([q, k, v], dim=-1).mT.contiguous().mT
            q, k, v = packed.chunk(3, dim=-1)
            grad = grad[:, :1, :1, :1].expand(self.shape)
        return grad, q, k, v


CASES = {
    "one token": Case((4, 16, 1, 32), "fp32"),  # see test_one_token
    "two tokens": Case((2, HEADS, 2, 32), "bf16"),
    "one token bf16": Case((2, HEADS, 1, 32), "bf16"),
    "odd": Case((2, HEADS, 63, 32), "bf16"),
    "many": Case((1, HEADS, 1000, 32), "bf16"),
    "rows": Case((2, HEADS, 130, 32), "bf16", "rows"),
    "rows fp16": Case((2, HEADS, 130, 32), "fp16", "rows"),
    "rows fp32": Case((2, HEADS, 130, 32), "fp32", "rows"),
    "chunks": Case((2, HEADS, 100, 32), "bf16", "chunks"),
    "chunks fp32": Case((2, HEADS, 100, 32), "fp32", "chunks"),
    "no q": Case((1, 2, 70, 32), "bf16", sign="no q"),
    "no k": Case((1, 2, 70, 32), "fp32", sign="no k"),
    "small": Case((2, HEADS, 70, 32), "fp32", scale=3e-9),  # q z is then of the order of eps
    "no eps": Case((2, HEADS, 70, 32), "fp32", eps=0.0),
    "one program": Case((1, 2, 300, 32), "fp32", split=320),
    "five programs": Case((1, 2, 600, 32), "bf16", "rows", split=128),
    "D=16": Case((1, 2, 70, 16), "bf16"),
    "D=64": Case((1, 2, 70, 64), "fp16"),
    "D=64 bf16": Case((1, 2, 70, 64), "bf16", "rows"),
    "D=64 fp32": Case((1, 2, 70, 64), "fp32"),
}
BOUNDED = [name for name in CASES if not name.startswith("one token")]


def run(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the kernels, into memory that starts as NaN."""
    from dataclasses import replace

    from plugins import relu_linear_attention_backward as kernels

    grad, *inputs = (t.to(device) for t in case.tensors())
    outputs = tuple(torch.full_like(t, float("nan")) for t in inputs)
    batch, heads, tokens, dim = case.shape
    tile = kernels.plan(batch=batch, heads=heads, tokens=tokens, head_dim=dim, dtype=case.dtype)
    if case.split is not None:
        tile = replace(tile, num_splits=-(-tokens // case.split), n_split=case.split)
    kernels.launch(grad, tuple(inputs), outputs, case.eps, tile)
    return outputs


def autograd(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    grad, *inputs = (t.to(dtype) for t in case.tensors())
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(ops.relu_linear_attention_truth(*leaves, case.eps), leaves, grad)


def check(case: Case, got: tuple[Tensor, ...], name: str) -> None:
    same, exact = autograd(case, DTYPES[case.dtype]), autograd(case, torch.float64)
    for letter, mine, peer, true in zip("qkv", got, same, exact, strict=True):
        assert mine.dtype == DTYPES[case.dtype]
        assert_parity(mine.cpu(), same=peer, exact=true, name=f"d{letter}, {name}")


def main(file: str) -> None:
    """Every case by Triton's interpreter. It multiplies bf16 matrices as if their bits were integers, and cuts bits off where a GPU
    rounds; both are mended here.
    """
    import triton.language as tl
    from parity.interpreter import make_language_ready_once
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    make_language_ready_once()
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return plain_dot(self, a, b, *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return plain_cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view("uint16"), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    torch.save({name: run(case) for name, case in CASES.items()}, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    """One process for all cases, of this file as a program."""
    file = tmp_path_factory.mktemp("backward") / "outputs"
    run_interpreted("import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')", __file__, str(file))
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDED)
def test_kernels(interpreted, name):
    check(CASES[name], interpreted[name], name)


@pytest.mark.slow
def test_a_wrong_gradient_is_caught(interpreted):
    dq, dk, dv = interpreted["odd"]
    with pytest.raises(AssertionError, match="expected at most"):
        check(CASES["odd"], (dq, dk * 1.01, dv), "planted")
    with pytest.raises(AssertionError, match="expected at most"):
        check(CASES["odd"], (dq, dk, dv.flip(1)), "planted")


# Of a largest term: what two bf16 numbers leave out of an fp32 one, 2**-17; and in fp32 what 32 terms lose when they are added up.
CANCELLED = {"one token": (2**-19, 2**-20), "one token bf16": (2**-16, 2**-8)}  # and the precision of dv


@pytest.mark.parametrize("name", ["one token", pytest.param("one token bf16", marks=pytest.mark.slow)])
def test_one_token(interpreted, name):
    """dq and dk are 0: their two terms cancel, and what is left depends on the machine, with PyTorch as well."""
    case, (left, precision) = CASES[name], CANCELLED[name]
    grad, q, k, v = (t.double() for t in case.tensors())
    q, k = q.relu(), k.relu()
    factor = (grad * v).abs().sum(-1, keepdim=True) / (q * k).sum(-1, keepdim=True)
    dq, dk, dv = interpreted[name]
    assert dq.abs().max() <= left * (factor * k).max()
    assert dk.abs().max() <= left * (factor * q).max()
    torch.testing.assert_close(dv.double(), grad, rtol=precision, atol=0)


def test_plan():
    """Splits are whole, cover every token, and are never more than the sums are worth."""
    from plugins.relu_linear_attention_backward import HEAD_DIMS, plan

    for dim in HEAD_DIMS:
        for dtype in DTYPES:
            for heads in (1, 70, 1120):
                for tokens in (1, 63, 64, 1000, 1024, 16384):
                    tile = plan(batch=1, heads=heads, tokens=tokens, head_dim=dim, dtype=dtype)
                    assert tile.n_split % tile.block_n == 0
                    assert (tile.num_splits - 1) * tile.n_split < tokens <= tile.num_splits * tile.n_split
                    assert tile.num_splits == 1 or tile.num_splits**2 * dim <= tokens


def test_bad_arguments():
    from plugins.relu_linear_attention_backward import Plan, launch

    x = torch.ones(1, 2, 8, 24)
    with pytest.raises(ValueError, match=r"got head_dim 24; expected one of \(16, 32, 64\)"):
        launch(x, (x, x, x), (x, x, x), ops.EPS)
    with pytest.raises(ValueError, match=r"expected one shape \(B, H, N, D\), dtype and device"):
        launch(x.half(), (x, x, x), (x, x, x), ops.EPS)
    x = torch.ones(1, 2, 8, 32)
    tile = Plan(num_splits=1, n_split=96, block_n=64, num_warps=4, num_stages=1)
    with pytest.raises(ValueError, match="expected n_split to be a multiple of block_n"):
        launch(x, (x, x, x), (x, x, x), ops.EPS, tile)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in BOUNDED])
def test_kernels_on_gpu(name):
    check(CASES[name], run(CASES[name], "cuda"), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_op_runs_the_kernels_and_is_faster_on_gpu():
    """The attention of a block of Sana-1.6B in a training step of 16 pictures of 1024 px."""
    from triton.testing import do_bench

    case = Case((16, 70, 1024, 32), "bf16", "rows")
    grad, *inputs = (t.cuda() for t in case.tensors())
    op = torch.ops.sana.relu_linear_attention_backward
    for mine, other in zip(op(grad, *inputs), run(case, "cuda"), strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == inputs[0].stride()
    kernels_ms, plain_ms = do_bench(lambda: op(grad, *inputs)), do_bench(lambda: ops._gradients(grad, *inputs, ops.EPS))
    print(f"gradient of relu_linear_attention, {case.shape} bf16: kernels {kernels_ms:.3f} ms, PyTorch {plain_ms:.3f} ms")
    assert kernels_ms < plain_ms


if __name__ == "__main__":
    main(*sys.argv[1:])
