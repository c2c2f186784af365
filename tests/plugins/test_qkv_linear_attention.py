"""The kernels (interpreted on a CPU, or on a GPU), ONNX function bodies and cubins of qkv_linear_attention."""

import json

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret
from torch import nn

from plugins import qkv_linear_attention as op
from plugins.launch import Launch, evaluate
from sana_ref import ops

# (B, N, H, D): one token, around a step, several parts with the last one short, and each size of a head
SHAPES = [(2, 1, 3, 32), (1, 65, 2, 32), (2, 70, 2, 16), (1, 70, 2, 64), (1, 70, 1, 112), (1, 1100, 1, 32)]
INTERPRETED = ("fp16", "fp32")  # not bf16, on a GPU only: Triton 3.9's interpreter cuts off where a GPU rounds to nearest
SMALL = {"fp16": 2e-7, "bf16": 3e-9, "fp32": 3e-9}  # q and k of this size bring relu(q) z down to eps, so that a wrong eps shows


def projection(shape, dtype, scale=1.0):
    batch, tokens, heads, dim = shape
    x = torch.randn(batch, tokens, 3, heads * dim, generator=torch.Generator().manual_seed(sum(shape)))
    x[:, :, :2] *= scale
    return x.flatten(2).to(DTYPES[dtype])


def interleave(qkv, heads):
    """The same heads, each with its q, k and v beside each other."""
    return qkv.unflatten(2, (3, heads, -1)).transpose(2, 3).flatten(2)


def angles(tokens, dim):
    """As a video's: cosines and sines, of angles up to the number of tokens."""
    turn = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    return torch.stack((turn.cos(), turn.sin()))


def check(got, qkv, heads, name, rotary=None):
    """qkv: not interleaved."""
    same, exact = (ops.qkv_linear_attention_truth(t, heads, rotary=rotary) for t in (qkv, qkv.double()))
    assert got.dtype == qkv.dtype
    assert_parity(got.cpu(), same=same.cpu(), exact=exact.cpu(), name=name)


def cases(dtypes):
    """(shape, dtype, scale)."""
    for dtype in dtypes:
        yield from ((shape, dtype, 1.0) for shape in SHAPES)
        yield (2, 70, 2, 32), dtype, SMALL[dtype]


def test_truth():
    """The same as the op of separate q, k, v, and heads joined."""
    qkv = projection((2, 7, 3, 16), "fp32")
    q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in qkv.chunk(3, -1))
    wanted = ops.relu_linear_attention_truth(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(ops.qkv_linear_attention(qkv, 3), wanted)
    assert torch.equal(ops.qkv_linear_attention(interleave(qkv, 3), 3, interleaved=True), wanted)


def test_registration():
    for interleaved in (False, True):
        arguments = (projection((2, 7, 3, 16), "fp32"), 3, op.EPS, interleaved)
        torch.library.opcheck(torch.ops.sana.qkv_linear_attention.default, arguments)
    with pytest.raises(ValueError, match=r"got qkv \(2, 7, 144\) torch.float32, 5 heads; expected floating \(B, N, 3 H D\)"):
        ops.qkv_linear_attention(projection((2, 7, 3, 16), "fp32"), 5)


class Plain(nn.Module):
    """Of diffusers' attention what its processor reads, without projections."""

    def __init__(self, qkv, heads):
        super().__init__()
        self.heads, self.norm_q, self.norm_k = heads, None, None
        self.to_q, self.to_k, self.to_v = (lambda _, part=part: part for part in qkv.chunk(3, -1))
        self.to_out = [nn.Identity(), nn.Identity()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 70, 2, 16), (1, 65, 3, 112)], ids=str)
def test_rotary_truth_is_that_of_diffusers(shape):
    from diffusers.models.transformers.transformer_sana_video import SanaLinearAttnProcessor3_0

    qkv, rotary = projection(shape, "fp32"), angles(shape[1], shape[3])
    cos, sin = (t.repeat_interleave(2, -1)[None, :, None] for t in rotary)
    wanted = SanaLinearAttnProcessor3_0()(Plain(qkv, shape[2]), qkv, rotary_emb=(cos, sin))
    torch.testing.assert_close(ops.qkv_linear_attention_truth(qkv, shape[2], rotary=rotary), wanted, rtol=1e-5, atol=1e-5)


LAUNCH = """
import torch
from plugins import qkv_linear_attention as kernels
def launch_rotary(out, qkv, heads, rotary, result):
    kernels.launch(qkv, result, int(heads), rotary=rotary)
def launch(out, qkv, heads, result):
    kernels.launch(qkv, result, int(heads))
def launch_interleaved(out, qkv, heads, result):
    kernels.launch(qkv, result, int(heads), interleaved=True)
def wrong_head(out, qkv, heads, result):
    kernels.launch(qkv.roll(kernels.HEAD_DIMS[0], -1), result, int(heads))
"""


# The last shows products of q and S in one TF32 for what they are: the more tokens, the more of S cancels.
ROTARY = [
    ((2, 70, 2, 32), "fp16"),
    ((1, 65, 1, 112), "fp16"),
    ((1, 65, 1, 112), "fp32"),
    ((1, 300, 1, 16), "fp32"),
    ((1, 4096, 4, 32), "fp16"),
]


@pytest.mark.slow
def test_kernels_with_a_rotary_embedding(tmp_path, monkeypatch):
    """And, planted, with the last token's angles for all."""
    (tmp_path / "rotary_launch.py").write_text(LAUNCH)
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    for shape, dtype in ROTARY:
        batch, tokens, heads, dim = shape
        empty = torch.empty(batch, tokens, heads * dim, dtype=DTYPES[dtype])
        calls.append(((empty, projection(shape, dtype), torch.tensor(heads), angles(tokens, dim)), {}))
    *inputs, rotary = calls[0][0]
    calls.append(((*inputs, rotary[:, -1:].expand(rotary.shape).contiguous()), {}))
    *outputs, wrong = interpret("rotary_launch:launch_rotary", calls)
    for (shape, dtype), got in zip(ROTARY, outputs, strict=True):
        check(got, projection(shape, dtype), shape[2], f"rotary {shape} {dtype}", angles(shape[1], shape[3]))
    with pytest.raises(AssertionError, match="expected at most"):
        check(wrong, inputs[1], 2, "the same angles for all", rotary)


@pytest.mark.parametrize(
    "rotary", [angles(70, 16), angles(70, 32).double(), angles(70, 32).transpose(1, 2)], ids=["D", "fp64", "last"]
)
def test_wrong_angles(rotary):
    qkv = projection((2, 70, 2, 32), "fp16")
    with pytest.raises(ValueError, match=r"got rotary .*; expected \(2, 70, 16\) fp32, contiguous, beside qkv"):
        op.launch(qkv, torch.empty(2, 70, 64, dtype=torch.float16), 2, rotary=rotary)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bf16"), (86, "fp16"), (89, "fp16"), (90, "fp32"), (100, "bf16"), (120, "fp16")]
)
@pytest.mark.parametrize("name", [op.STATE, op.APPLY])
def test_rotary_cubins(name, capability, dtype):
    """Of Sana-Video's heads, within shared memory (compile_cubin raises otherwise); a pointer more than without."""
    with_, without = (op.compile_cubin(name, capability, dtype, 112, False, rotary=rotary) for rotary in (True, False))
    assert with_.params == without.params + 1


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Outputs by case, all from one process; last, one whose heads are wrong."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "qkv_launch.py").write_text(LAUNCH)
    named = [*cases(INTERPRETED)]
    calls, interleaved = [], []
    for shape, dtype, scale in named:
        batch, tokens, heads, dim = shape
        empty, qkv = torch.empty(batch, tokens, heads * dim, dtype=DTYPES[dtype]), projection(shape, dtype, scale)
        calls.append(((empty, qkv, torch.tensor(heads)), {}))
        interleaved.append(((empty, interleave(qkv, heads), torch.tensor(heads)), {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("qkv_launch:launch", calls)
        others = interpret("qkv_launch:launch_interleaved", interleaved)
        wrong = interpret("qkv_launch:wrong_head", calls[1:2])
    return {case: (each, other) for case, each, other in zip(named, outputs, others, strict=True)} | {"wrong": wrong[0]}


@pytest.mark.parametrize("case", cases(INTERPRETED), ids=str)
def test_kernels(interpreted, case):
    shape, dtype, scale = case
    got, interleaved = interpreted[case]
    check(got, projection(shape, dtype, scale), shape[2], f"kernels {case}")
    assert torch.equal(interleaved, got)  # the same sums, read elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_a_nan_stays_one(tmp_path, monkeypatch, rotary):
    """Of q in its token, of k and v in all tokens of its head."""
    (tmp_path / "nan_launch.py").write_text(LAUNCH)
    monkeypatch.syspath_prepend(tmp_path)
    shape, calls = (1, 70, 2, 32), []
    for part in range(3):
        qkv = projection(shape, "fp16").unflatten(2, (3, 2, 32))
        qkv[0, 66, part, 1, 4] = torch.nan
        given = (torch.empty(1, 70, 64).half(), qkv.flatten(2), torch.tensor(2))
        calls.append(((*given, angles(70, 32)) if rotary else given, {}))
    outputs = [out.unflatten(2, (2, 32)).isnan() for out in interpret(f"nan_launch:launch{'_rotary' if rotary else ''}", calls)]
    assert not any(out[:, :, 0].any() for out in outputs)
    q, k, v = (out[0, :, 1] for out in outputs)
    assert q.all(-1).nonzero().flatten().tolist() == q.any(-1).nonzero().flatten().tolist() == [66]
    assert k.all()
    assert v.any(0).nonzero().flatten().tolist() == v.all(0).nonzero().flatten().tolist() == [4]


def test_planted_error_is_caught(interpreted):
    with pytest.raises(AssertionError, match="expected at most"):
        check(interpreted["wrong"], projection(SHAPES[1], "fp16"), SHAPES[1][2], "channels moved")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", [*cases(DTYPES), ((2, 4096, 70, 32), "fp16", 1.0), ((2, 4096, 70, 32), "bf16", 1.0)], ids=str)
def test_op_on_gpu(case):
    shape, dtype, scale = case
    qkv = projection(shape, dtype, scale).cuda()
    got = ops.qkv_linear_attention(qkv, shape[2])
    check(got, qkv, shape[2], f"op {case}")
    assert torch.equal(ops.qkv_linear_attention(qkv, shape[2]), got)
    rotary = angles(shape[1], shape[3]).cuda()
    op.launch(qkv, got, shape[2], rotary=rotary)
    check(got, qkv, shape[2], f"rotary {case}", rotary)
    got = ops.qkv_linear_attention(qkv, shape[2])
    assert torch.equal(ops.qkv_linear_attention(interleave(qkv, shape[2]), shape[2], interleaved=True), got)


@pytest.mark.parametrize("interleaved", [False, True], ids=["plain", "interleaved"])
@pytest.mark.parametrize("case", cases(["fp16", "fp32"]), ids=str)
def test_function_bodies(case, interleaved):
    """In ONNX Runtime, without the plugin's attributes and with one of them."""
    shape, dtype, scale = case
    heads, dim = shape[2:]
    layout = op.layout(heads, dim, interleaved=interleaved)
    nodes = [
        helper.make_node(op.STATE, ["qkv"], ["state"], domain=op.DOMAIN, **layout),
        helper.make_node(op.APPLY, ["qkv", "state"], ["out"], domain=op.DOMAIN, **layout, launch="unused"),
    ]
    qkv = projection(shape, dtype, scale)
    fed = {"qkv": (interleave(qkv, heads) if interleaved else qkv, ["b", "n", 3 * heads * dim])}
    made = {"out": (qkv.dtype, ["b", "n", heads * dim])}
    (got,) = run_bodies(nodes, [op.function_body(op.STATE), op.function_body(op.APPLY)], fed, made)
    check(got, qkv, shape[2], f"bodies {case}")
    with pytest.raises(AssertionError, match="expected at most"):
        check(got * 1.02, qkv, shape[2], "2 % too much")


def test_eps_is_the_truths():
    assert op.EPS == ops.EPS


def numbers(launch, dims):
    return [evaluate(arg[1], dims) for arg in json.loads(launch.to_json())["args"] if arg[0] == "i32"]


@pytest.mark.parametrize("tokens", [1, 64, 512, 513, 1024, 4096, 9216, 16384, 65536])
def test_parts(tokens):
    """What the plugin computes from the JSON: parts cover all tokens, whole steps each, and are those of a launch from PyTorch."""
    attributes = {name: op.compile_cubins(name, ["sm90"], "fp16", 70, 32) for name in (op.STATE, op.APPLY)}
    launches = {name: Launch.from_json(each["launch"]) for name, each in attributes.items()}
    dims = [(2, tokens, 3 * 70 * 32)]
    state = [evaluate(size, dims) for size in launches[op.STATE].outputs[0].shape]
    assert state == [2, 70, op.num_parts(tokens), 33, 32]
    assert [evaluate(size, dims) for size in launches[op.STATE].grid] == [140, op.num_parts(tokens), 1]
    *_, n_part = numbers(launches[op.STATE], dims)
    assert n_part % op.PLANS[op.STATE][0] == 0
    assert n_part * op.num_parts(tokens) >= tokens
    dims.append(tuple(state))
    assert numbers(launches[op.APPLY], dims) == [70, tokens, op.tile(tokens), op.num_parts(tokens)]
    assert op.tile(tokens) % op.PLANS[op.APPLY][0] == 0
    assert ["f32", op.EPS] in json.loads(launches[op.APPLY].to_json())["args"]
    assert evaluate(launches[op.APPLY].grid[1], dims) * op.tile(tokens) >= tokens
    assert [evaluate(size, dims) for size in launches[op.APPLY].outputs[0].shape] == [2, tokens, 70 * 32]


@pytest.mark.parametrize("name", [op.STATE, op.APPLY])
@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["plain", "interleaved"])
def test_cubins(target, name, interleaved):
    for dtype in DTYPES:
        attributes = op.compile_cubins(name, [target], dtype, 2, 32, interleaved=interleaved)
        launch = Launch.from_json(attributes["launch"])
        assert {each: attributes[each] for each in ("split", "axis")} == op.layout(2, 32, interleaved=interleaved)
        assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
        assert launch.inputs == ([dtype] if name == op.STATE else [dtype, "fp32"])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got head_dim 24; expected one of \(16, 32, 64, 112\)"):
        op.compile_cubins(op.STATE, ["sm89"], "fp16", 2, 24)
    with pytest.raises(ValueError, match="got dtype 'int8'"):
        op.compile_cubins(op.APPLY, ["sm89"], "int8", 2, 32)
    with pytest.raises(ValueError, match=r"expected \(B, N, 3 H D\) and \(B, N, H D\), contiguous"):
        op.launch(torch.ones(1, 4, 96), torch.ones(1, 4, 96), 1)
