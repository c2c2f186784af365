"""The kernel (interpreted on a CPU, or on a GPU), ONNX function body and cubins of cross_attention."""

import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret

from plugins import cross_attention as op
from plugins.cubin import CAPABILITIES
from plugins.launch import Launch, evaluate
from sana_ref import attention_ops
from sana_ref.transformer import MASKED

INTERPRETED = ("fp16", "fp32")  # not bf16, on a GPU only: Triton 3.9's interpreter multiplies its bits as integers


@dataclass(frozen=True)
class Case:
    """live: how many keys of each text are not padding, kB in all."""

    tokens: int
    keys: int
    dim: int
    live: tuple[int, ...]
    texts: int = 1
    heads: int = 2
    blocks: int = 1
    block: int = 0
    dtype: str = "fp16"

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.live), self.tokens, self.heads * self.dim

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, keys, values, bias: padding lies behind the text, and its keys and values are as large as others."""
        generator = torch.Generator().manual_seed(self.tokens + self.keys)
        rows = (self.blocks, self.texts, len(self.live) // self.texts, self.heads, self.keys, self.dim)
        q, keys, values = (torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for shape in (self.shape, rows, rows))
        bias = torch.zeros(len(self.live), self.keys)
        for row, live in zip(bias, self.live, strict=True):
            row[live:] = MASKED
        return 2 * q, keys, values, bias.to(q.dtype)


def cases(dtypes):
    """One token and one key; around the steps over either; each block of a head, in parts and whole; no key, one, some and all."""
    for dtype in dtypes:
        yield Case(1, 1, 16, (1,), dtype=dtype)
        yield Case(63, 64, 16, (64, 1, 33, 0), texts=2, dtype=dtype)
        yield Case(65, 65, 72, (65, 64), blocks=3, block=2, dtype=dtype)
        yield Case(129, 140, 72, (140, 0), dtype=dtype)
        yield Case(128, 64, 96, (64, 9), texts=2, heads=1, dtype=dtype)
        yield Case(70, 70, 112, (3, 0), texts=2, heads=3, blocks=2, block=1, dtype=dtype)
        yield Case(33, 300, 112, (300, 129), heads=1, dtype=dtype)
        yield Case(40, 130, 20, (130, 2, 70, 64, 0, 128), texts=2, blocks=2, block=1, dtype=dtype)


def eager(q, keys, values, bias, block):
    """PyTorch at the inputs' precision, as sana_ref.transformer.CrossAttention computes it where it is not fused."""
    k, v = keys[block].flatten(0, 1), values[block].flatten(0, 1)
    heads, dim = k.shape[1], k.shape[3]
    q = (q.float() * dim**-0.5).to(q.dtype).unflatten(2, (heads, dim)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None], scale=1.0)
    return out.transpose(1, 2).flatten(2)


def check(got, case, inputs, name):
    same = eager(*inputs, case.block)
    exact = attention_ops.cross_attention_truth(*(t.double() for t in inputs), case.block)
    assert got.dtype == inputs[0].dtype
    assert_parity(got.cpu(), same=same.cpu(), exact=exact.cpu(), name=name)


def test_truth():
    """The same as PyTorch's own attention, also without any live key."""
    for case in cases(["fp32"]):
        inputs = tuple(t.double() for t in case.inputs())
        wanted = eager(*inputs, case.block)
        torch.testing.assert_close(attention_ops.cross_attention(*inputs, case.block), wanted, atol=1e-6, rtol=1e-6)


def test_registration():
    inputs = Case(7, 5, 16, (5, 2), blocks=2, dtype="fp32").inputs()
    torch.library.opcheck(torch.ops.sana.cross_attention.default, (*inputs, 1))
    with pytest.raises(ValueError, match=r"block 2; expected \(kB, N, H D\), twice \(blocks, k, B, H, L, D\), \(kB, L\)"):
        attention_ops.cross_attention(*inputs, 2)
    with pytest.raises(ValueError, match=r"\(2, 7, 31\) torch.float32.*of one floating dtype"):
        attention_ops.cross_attention(inputs[0][..., 1:], *inputs[1:], 0)


LAUNCH = """
import math
from plugins import cross_attention as kernels
def launch(q, keys, values, bias, out, block):
    kernels.launch(q, keys, values, bias, out, block)
def unskipped(q, keys, values, bias, out, block):
    far, kernels.FAR = kernels.FAR, math.inf
    launch(q, keys, values, bias, out, block)
    kernels.FAR = far
def wrong_block(q, keys, values, bias, out, block):
    launch(q, keys, values, bias, out, block - 1)
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A function: outputs by case of a function of LAUNCH."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "cross_launch.py").write_text(LAUNCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield lambda name, chosen: dict(
            zip(chosen, interpret(f"cross_launch:{name}", [(case.inputs(), {"block": case.block}) for case in chosen]), strict=True)
        )


@pytest.fixture(scope="module")
def outputs(interpreted):
    return interpreted("launch", [*cases(INTERPRETED)])


@pytest.mark.parametrize("case", [*cases(INTERPRETED)], ids=str)
def test_kernel(outputs, case):
    check(outputs[case], case, case.inputs(), f"kernel {case}")


@pytest.mark.slow
def test_keys_that_are_skipped_change_no_bit(interpreted, outputs):
    for case, whole in interpreted("unskipped", [*cases(INTERPRETED)]).items():
        assert torch.equal(outputs[case], whole), case


@pytest.mark.slow
def test_skipped_keys_are_not_read(interpreted):
    """Those of a step that is behind the last live key: not even NaN reaches the result."""
    case = Case(5, 200, 16, (2,))
    q, keys, values, bias = case.inputs()
    keys[..., 64:, :] = values[..., 64:, :] = torch.nan
    (got,) = interpret("plugins.cross_attention:launch", [((q, keys, values, bias), {"block": 0})])
    check(got, case, case.inputs(), "poisoned padding")


@pytest.mark.slow
def test_planted_error_is_caught(interpreted):
    case = next(case for case in cases(["fp16"]) if case.block)
    (wrong,) = interpreted("wrong_block", [case]).values()
    with pytest.raises(AssertionError, match="expected at most"):
        check(wrong, case, case.inputs(), "another block's text")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "case",
    [
        *cases(DTYPES),
        *(Case(1024, 300, 112, (300, 20), texts=2, heads=20, blocks=2, block=1, dtype=dtype) for dtype in ("fp16", "bf16")),
        Case(1024, 300, 72, (1, 150), texts=2, heads=16, blocks=2, block=1),
    ],
    ids=str,
)
def test_op_on_gpu(case, monkeypatch):
    inputs = tuple(t.cuda() for t in case.inputs())
    got = attention_ops.cross_attention(*inputs, case.block)
    check(got, case, inputs, f"op {case}")
    assert torch.equal(attention_ops.cross_attention(*inputs, case.block), got)
    monkeypatch.setattr(op, "FAR", torch.inf)
    assert torch.equal(attention_ops.cross_attention(*inputs, case.block), got)


def run_body(case, inputs):
    names = ("q", "keys", "values", "bias")
    node = helper.make_node(op.OP, names, ["out"], domain=op.DOMAIN, block=case.block, launch="unused")
    whole, text = ["kb", "n", case.heads * case.dim], ["blocks", "k", "b", case.heads, "l", case.dim]
    given = {name: (t, sizes) for name, t, sizes in zip(names, inputs, (whole, text, text, ["kb", "l"]), strict=True)}
    return run_bodies([node], [op.function_body()], given, {"out": (inputs[0].dtype, whole)})


@pytest.mark.parametrize("case", [*cases(["fp16", "fp32"])], ids=str)
def test_function_body(case):
    """In ONNX Runtime, with one of the plugin's attributes."""
    inputs = case.inputs()
    (got,) = run_body(case, inputs)
    check(got, case, inputs, f"body {case}")
    with pytest.raises(AssertionError, match="expected at most"):
        check(got * 1.02, case, inputs, "2 % too much")


def test_padding_is_far_and_what_is_meant_is_near():
    for dtype in DTYPES.values():
        assert torch.tensor(MASKED, dtype=dtype).float() < -op.FAR - 1000
    assert torch.tensor(-104.0).exp() == 0
    assert op.FAR > 1000


@pytest.mark.parametrize("head_dim", [112, 72])
def test_launch_description(head_dim):
    """What the plugin computes from the JSON: the grid covers all tokens of each head and picture."""
    width = 20 * head_dim
    launch = Launch.from_json(op.compile_cubins(["sm89"], "fp16", heads=20, n_keys=300, head_dim=head_dim, block=7)["launch"])
    text, block_m = (20, 2, 3, 20, 300, head_dim), op.blocks(89, "fp16", head_dim).m
    for tokens in (1, 64, 65, 128, 129, 1024):
        dims = [(6, tokens, width), text, text, (6, 300)]
        blocks, *others = (evaluate(size, dims) for size in launch.grid)
        assert others == [20, 6]
        assert (blocks - 1) * block_m < tokens <= blocks * block_m
        assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [6, tokens, width]
        args = json.loads(launch.to_json())["args"]
        assert [evaluate(arg[1], dims) for arg in args if arg[0] == "i32"] == [tokens, 300, 7]


def test_blocks_of_a_head():
    """No more channels than in one block, a quarter less where there are two; and one grid serves every architecture."""
    for head_dim in range(1, op.MAX_HEAD_DIM + 1):
        first, rest = op.parts(head_dim)
        whole = max(16, 2 ** (head_dim - 1).bit_length())
        assert first + rest >= head_dim
        assert (first, rest) == (whole, 0) or ((first, rest) == (whole // 2, rest) and 16 <= rest <= whole // 4)
        for dtype in DTYPES:
            assert len({op.blocks(capability, dtype, head_dim).m for capability in CAPABILITIES}) == 1
    assert op.parts(72) == (64, 16)
    assert op.parts(112) == (128, 0)


SLOW = [(sm, dtype) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120") for dtype in DTYPES]
SLOW += [("sm80", "bf16"), ("sm80", "fp32")]


@pytest.mark.parametrize(("target", "dtype"), [("sm80", "fp16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_cubins(target, dtype):
    """Of the largest head, whole and in parts: what compiles has the shared memory of every GPU."""
    op.compile_cubins([target], dtype, heads=2, n_keys=300, head_dim=96, block=1)
    attributes = op.compile_cubins([target], dtype, heads=2, n_keys=300, head_dim=112, block=1)
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    assert launch.inputs == [dtype] * 4
    assert attributes["block"] == 1


def test_bad_arguments():
    sizes = {"heads": 2, "n_keys": 5, "head_dim": 16, "block": 0}
    with pytest.raises(ValueError, match="got 5 keys, head_dim 129; expected 1 or more, and 1 to 128"):
        op.compile_cubins(["sm89"], "fp16", **sizes | {"head_dim": 129})
    with pytest.raises(ValueError, match="got 0 keys"):
        op.compile_cubins(["sm89"], "fp16", **sizes | {"n_keys": 0})
    with pytest.raises(ValueError, match="got dtype 'int8'"):
        op.compile_cubins(["sm89"], "int8", **sizes)
    q, keys, values, bias = Case(4, 5, 16, (5,)).inputs()
    with pytest.raises(ValueError, match=r"block 1; expected \(kB, N, H D\), twice"):
        op.launch(q, keys, values, bias, q.clone(), 1)
    with pytest.raises(ValueError, match="contiguous, of one dtype"):
        op.launch(q, keys, values, bias.float(), q.clone(), 0)
