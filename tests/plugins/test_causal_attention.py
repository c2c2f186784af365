"""The kernels (interpreted on a CPU, or on a GPU), ONNX function bodies and cubins of causal_attention."""

from dataclasses import dataclass

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret

from plugins import causal_attention as op
from plugins.cubin import CAPABILITIES
from plugins.launch import Launch, evaluate
from sana_ref import attention_ops
from sana_ref.text_encoder import Gemma2Attention, Gemma2Config, blocking_bias, rotations

INTERPRETED = ("fp16",)  # not bf16, on a GPU only: Triton 3.9's interpreter multiplies its bits as integers


@dataclass(frozen=True)
class Case:
    """live: how many tokens of each text are not padding."""

    tokens: int
    live: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    window: int | None = None
    cap: float = 50.0
    dtype: str = "fp16"

    @property
    def options(self) -> dict[str, object]:
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "window": self.window}
        return sizes | {"scale": self.dim**-0.5, "cap": self.cap}

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """qkv, cos, sin, live: scores that the cap bends; padding is as large as the text."""
        generator = torch.Generator().manual_seed(self.tokens + self.dim)
        qkv = torch.randn((len(self.live), self.tokens, (self.heads + 2 * self.kv_heads) * self.dim), generator=generator)
        live = torch.arange(self.tokens) < torch.tensor(self.live)[:, None]
        cos, sin = rotations(torch.arange(self.tokens), self.dim, 10000.0)
        dtype = DTYPES[self.dtype]
        return (3 * qkv).to(dtype), cos.contiguous(), sin.contiguous(), live.to(dtype)


def cases(dtypes):
    """One token; around the steps over tokens and rows; heads of one, two and three queries; windows; padding; a low cap."""
    for dtype in dtypes:
        yield Case(1, (1,), dtype=dtype)
        yield Case(33, (33, 20), dtype=dtype)
        yield Case(64, (64,), heads=1, dim=20, dtype=dtype)
        yield Case(65, (65, 1), heads=6, kv_heads=2, dim=32, dtype=dtype)
        yield Case(130, (130, 97), heads=2, kv_heads=2, window=40, cap=5.0, dtype=dtype)
        yield Case(70, (30,), window=3, dtype=dtype)  # padding that sees nothing
        yield Case(40, (40, 17), dim=256, dtype=dtype)


class Given(torch.nn.Module):
    """What a projection leaves."""

    def __init__(self, projected):
        super().__init__()
        self.projected = projected

    def forward(self, x):
        return self.projected


def eager(case, qkv, cos, sin, live):
    """PyTorch at the inputs' precision, as Gemma2Attention computes it where it is not fused."""
    config = Gemma2Config(
        hidden_size=qkv.shape[2],
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.dim,
        query_pre_attn_scalar=case.dim,
        attn_logit_softcapping=case.cap,
    )
    module = Gemma2Attention(config)
    parts = qkv.split([n * case.dim for n in (case.heads, case.kv_heads, case.kv_heads)], dim=2)
    module.q_proj, module.k_proj, module.v_proj = map(Given, parts)
    module.o_proj = torch.nn.Identity()
    position = torch.arange(case.tokens, device=qkv.device)
    back = position[:, None] - position[None]
    seen = (back >= 0) & (live != 0)[:, None, None]
    seen = seen if case.window is None else seen & (back < case.window)
    bias = blocking_bias(seen).repeat(1, 1, case.heads // case.kv_heads, 1)
    out = module(qkv, cos, sin, (case.window, bias))
    return out * seen.any(-1).transpose(1, 2).to(out.dtype)


def check(got, case, inputs, name):
    exact = attention_ops.causal_attention_truth(*(t.double() for t in inputs), **case.options)
    assert got.dtype == inputs[0].dtype
    assert_parity(got.cpu(), same=eager(case, *inputs).cpu(), exact=exact.cpu(), name=name)


def test_truth():
    """What Gemma2Attention computes where it is not fused, which other tests hold to transformers."""
    for case in cases(["fp32"]):
        inputs = case.inputs()
        torch.testing.assert_close(
            attention_ops.causal_attention(*inputs, **case.options), eager(case, *inputs), atol=2e-5, rtol=2e-5
        )


def test_registration():
    inputs, options = Case(7, (7, 4), dtype="fp32").inputs(), (2, 1, 0.25, 50.0, None)
    torch.library.opcheck(torch.ops.sana.causal_attention.default, (*inputs, *options))
    with pytest.raises(ValueError, match=r"3 heads, 2 of keys; expected \(B, S, \(H \+ 2 K\) D\), twice \(S, D / 2\)"):
        attention_ops.causal_attention(*inputs, num_heads=3, num_kv_heads=2, scale=1.0, cap=1.0)
    with pytest.raises(ValueError, match=r"\(2, 7\) torch.float16.*of one floating dtype"):
        attention_ops.causal_attention(*inputs[:3], inputs[3].half(), num_heads=2, num_kv_heads=1, scale=1.0, cap=1.0)


LAUNCH = """
from plugins import causal_attention as kernels
def launch(qkv, cos, sin, live, out, **options):
    heads, dim = options["num_heads"], 2 * cos.shape[1]
    kernels.launch(qkv, cos, sin, live, whole := qkv.new_full((*qkv.shape[:2], heads * dim), float("nan")), **options)
    out[..., : heads * dim] = whole
def one_token_more(qkv, cos, sin, live, out, **options):
    launch(qkv, cos, sin, live, out, **options | {"window": options["window"] + 1})
def not_turned(qkv, cos, sin, live, out, **options):
    launch(qkv, cos * 0 + 1, sin * 0, live, out, **options)
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A function: outputs by case of a function of LAUNCH."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "causal_launch.py").write_text(LAUNCH)

    def run(name, chosen):
        found = interpret(f"causal_launch:{name}", [(case.inputs(), case.options) for case in chosen])
        return {case: out[..., : case.heads * case.dim] for case, out in zip(chosen, found, strict=True)}

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield run


@pytest.fixture(scope="module")
def outputs(interpreted):
    return interpreted("launch", [*cases(INTERPRETED)])


@pytest.mark.parametrize("case", [*cases(INTERPRETED)], ids=str)
def test_kernel(outputs, case):
    check(outputs[case], case, case.inputs(), f"kernel {case}")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["one_token_more", "not_turned"])
def test_planted_error_is_caught(interpreted, wrong):
    case = next(case for case in cases(["fp16"]) if case.window == 40)
    (got,) = interpreted(wrong, [case]).values()
    with pytest.raises(AssertionError, match="expected at most"):
        check(got, case, case.inputs(), wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "case",
    [
        *cases(op.TYPES),
        *(Case(size, (size, 20), heads=8, kv_heads=4, dim=256, dtype=dtype) for size in (300, 500) for dtype in ("bf16", "fp16")),
        Case(300, (300, 20), heads=6, kv_heads=3, dim=32, window=64, dtype="bf16"),
    ],
    ids=str,
)
def test_op_on_gpu(case):
    inputs = tuple(t.cuda() for t in case.inputs())
    got = attention_ops.causal_attention(*inputs, **case.options)
    check(got, case, inputs, f"op {case}")
    assert torch.equal(attention_ops.causal_attention(*inputs, **case.options), got)


def run_body(case, inputs):
    layout = op.layout(case.heads, case.kv_heads, case.dim)
    numbers = {"scale": case.dim**-0.5, "cap": case.cap, "window": op.ALL if case.window is None else case.window}
    nodes = [
        helper.make_node(op.ROTATE, op.INPUTS[op.ROTATE], ["turned"], domain=op.DOMAIN, launch="unused", **layout[op.ROTATE]),
        helper.make_node(op.ATTEND, op.INPUTS[op.ATTEND], ["out"], domain=op.DOMAIN, **layout[op.ATTEND], **numbers),
    ]
    table = ["s", case.dim // 2]
    sizes = {"qkv": ["b", "s", (case.heads + 2 * case.kv_heads) * case.dim], "cos": table, "sin": table, "live": ["b", "s"]}
    given = {name: (t, sizes[name]) for name, t in zip(sizes, inputs, strict=True)}
    made = {"out": (inputs[0].dtype, ["b", "s", case.heads * case.dim])}
    return run_bodies(nodes, [op.function_body(name) for name in op.INPUTS], given, made)


@pytest.mark.parametrize("case", [*cases(["fp16", "fp32"])], ids=str)
def test_function_bodies(case):
    """In ONNX Runtime, with one of the plugin's attributes."""
    inputs = case.inputs()
    (got,) = run_body(case, inputs)
    check(got, case, inputs, f"body {case}")
    with pytest.raises(AssertionError, match="expected at most"):
        check(got * 1.02, case, inputs, "2 % too much")


def test_launch_descriptions():
    """What the plugins compute from the JSON: the grids cover all heads of all tokens and texts."""
    numbers = {"scale": 0.0625, "cap": 50.0, "window": 4096}
    rotate, attend = (
        op.compile_cubins(name, ["sm89"], "bf16", 8, 4, 256, **(numbers if name == op.ATTEND else {})) for name in op.INPUTS
    )
    for tokens in (1, 15, 16, 300, 501):
        qkv, turned = (2, tokens, 4096), (2, tokens, 3072)
        launch = Launch.from_json(rotate["launch"])
        dims = [qkv, (tokens, 128), (tokens, 128)]
        blocks, *others = (evaluate(size, dims) for size in launch.grid)
        assert others == [2, 1]
        assert (blocks - 1) * op.ROTATE_ROWS < 12 * tokens <= blocks * op.ROTATE_ROWS
        assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [*turned]
        launch, dims = Launch.from_json(attend["launch"]), [turned, qkv, (2, tokens)]
        blocks, *others = (evaluate(size, dims) for size in launch.grid)
        assert others == [4, 2]
        assert (blocks - 1) * 64 < 2 * tokens <= blocks * 64
        assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [2, tokens, 2048]
        assert launch.args[4:8] == [["i32", ["dim", 0, 1]], ["i32", 4096], ["f32", 0.0625], ["f32", 50.0]]


def test_one_grid_serves_every_architecture():
    assert {op.blocks(capability, dim).m for capability in CAPABILITIES for dim in (16, 64, 65, 256)} == {64}


SLOW = [("sm80", "fp16"), *((sm, dtype) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120") for dtype in op.TYPES)]


@pytest.mark.parametrize(("target", "dtype"), [("sm80", "bf16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_cubins(target, dtype):
    """Of Gemma's heads and of narrow ones: what compiles has the shared memory of every GPU."""
    for sizes in ((8, 4, 256), (6, 3, 32)):
        for name in op.INPUTS:
            attributes = op.compile_cubins(name, [target], dtype, *sizes)
            launch = Launch.from_json(attributes["launch"])
            assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
            assert launch.inputs == ([dtype, "fp32", "fp32"] if name == op.ROTATE else [dtype] * 3)


def test_bad_arguments():
    for sizes in ((3, 2, 16), (2, 0, 16), (2, 1, 15), (2, 1, 258)):
        with pytest.raises(ValueError, match=r"heads, .* of keys, head_dim .*; expected a multiple"):
            op.compile_cubins(op.ATTEND, ["sm89"], "fp16", *sizes)
    with pytest.raises(ValueError, match="got dtype 'fp32'; expected one of fp16, bf16"):
        op.compile_cubins(op.ROTATE, ["sm89"], "fp32", 2, 1, 16)
    case = Case(4, (4,))
    qkv, cos, sin, live = case.inputs()
    out = qkv.new_empty((1, 4, 32))
    for wrong in ((qkv, cos.half(), sin, live, out), (qkv, cos, sin, live.float(), out), (qkv, cos[:3], sin[:3], live, out)):
        with pytest.raises(ValueError, match=r"expected \(B, S, \(H \+ 2 K\) D\), twice \(S, D / 2\) in fp32"):
            op.launch(*wrong, **case.options)
