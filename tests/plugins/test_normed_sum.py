"""The kernel (interpreted on a CPU, or on a GPU), ONNX function body and cubins of normed_sum."""

from dataclasses import dataclass

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret

from plugins import normed_sum as op
from plugins.launch import Launch, evaluate
from sana_ref import norm_ops
from sana_ref.text_encoder import Gemma2RMSNorm

EPS = 1e-6
INTERPRETED = ("fp16", "fp32")  # not bf16, on a GPU only: Triton 3.9's interpreter cuts off where a GPU rounds to nearest


@dataclass(frozen=True)
class Case:
    """scale: of the branch, which its norm takes away."""

    texts: int
    tokens: int
    dim: int
    scale: float = 1.0
    eps: float = EPS
    dtype: str = "bf16"

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """x, branch, branch_weight, weight."""
        generator = torch.Generator().manual_seed(self.tokens + self.dim)
        x, branch = torch.randn((2, self.texts, self.tokens, self.dim), generator=generator)
        weights = torch.randn((2, self.dim), generator=generator)
        return tuple(t.to(DTYPES[self.dtype]) for t in (8 * x, self.scale * branch, *weights))


def cases(dtypes):
    """Rows of one channel, in one tensor and in two; Gemma's; a branch of zeros, of which eps alone is left; a large eps."""
    for dtype in dtypes:
        yield Case(1, 1, 1, dtype=dtype)
        yield Case(2, 3, 64, dtype=dtype)
        yield Case(1, 2, 96, scale=100.0, dtype=dtype)
        yield Case(1, 5, 72, scale=0.0, dtype=dtype)
        yield Case(2, 1, 33, eps=0.5, dtype=dtype)
        yield Case(1, 3, 2304, dtype=dtype)


def eager(case, x, branch, branch_weight, weight):
    """PyTorch at the inputs' precision, as Gemma2Layer computes it where it is not fused."""

    def norm(of, weight):
        module = Gemma2RMSNorm(case.dim, case.eps)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module(of)

    hidden = x + norm(branch, branch_weight)
    return hidden, norm(hidden, weight)


def check(got, case, inputs, name):
    exact = norm_ops.normed_sum_truth(*(t.double() for t in inputs), case.eps)
    for output, each, wanted, same in zip(("hidden", "normed"), got, exact, eager(case, *inputs), strict=True):
        assert each.dtype == inputs[0].dtype
        assert_parity(each.cpu(), same=same.cpu(), exact=wanted.cpu(), name=f"{name}, {output}")


def test_truth():
    """What Gemma2Layer computes where it is not fused, which other tests hold to transformers."""
    for case in cases(["fp32"]):
        inputs = case.inputs()
        torch.testing.assert_close(norm_ops.normed_sum(*inputs, case.eps), eager(case, *inputs), atol=2e-5, rtol=2e-5)


def test_registration():
    x, branch, branch_weight, weight = Case(2, 3, 8, dtype="fp32").inputs()
    torch.library.opcheck(torch.ops.sana.normed_sum.default, (x, branch, branch_weight, weight, EPS))
    for wrong in (
        (x, branch[:, :2], branch_weight, weight),
        (x, branch, branch_weight[:7], weight),
        (x[0], branch[0], weight, weight),
    ):
        with pytest.raises(ValueError, match=r"normed_sum: got x, branch, .*; expected twice \(B, S, D\) and twice \(D,\)"):
            norm_ops.normed_sum(*wrong, EPS)
    with pytest.raises(ValueError, match=r"\(8,\) torch.float16; .*of one floating dtype"):
        norm_ops.normed_sum(x, branch, branch_weight, weight.half(), EPS)


LAUNCH = """
from plugins import normed_sum as kernels
def launch(both, branch_weight, weight, out, *, eps):
    kernels.launch(both[0], both[1], branch_weight, weight, (out[0], out[1]), eps)
def other_weight(both, branch_weight, weight, out, *, eps):
    launch(both, weight, branch_weight, out, eps=eps)
def other_eps(both, branch_weight, weight, out, *, eps):
    launch(both, branch_weight, weight, out, eps=2 * eps)
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A function: outputs by case of a function of LAUNCH."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "normed_launch.py").write_text(LAUNCH)

    def run(name, chosen):
        calls = []
        for case in chosen:
            x, branch, *weights = case.inputs()
            calls.append(((torch.stack([x, branch]), *weights), {"eps": case.eps}))
        return dict(zip(chosen, interpret(f"normed_launch:{name}", calls), strict=True))

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
@pytest.mark.parametrize("wrong", ["other_weight", "other_eps"])
def test_planted_error_is_caught(interpreted, wrong):
    case = Case(2, 1, 33, eps=0.5, dtype="fp32")
    (got,) = interpreted(wrong, [case]).values()
    with pytest.raises(AssertionError, match="expected at most"):
        check(got, case, case.inputs(), wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "case", [*cases(DTYPES), *(Case(2, size, 2304, dtype=dtype) for size in (300, 500) for dtype in DTYPES)], ids=str
)
def test_op_on_gpu(case):
    inputs = tuple(t.cuda() for t in case.inputs())
    got = norm_ops.normed_sum(*inputs, case.eps)
    check(got, case, inputs, f"op {case}")
    for again, first in zip(norm_ops.normed_sum(*inputs, case.eps), got, strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("case", [case for case in cases(["fp16", "fp32"]) if case.dim < 2304], ids=str)
def test_function_body(case):
    """In ONNX Runtime, with one of the plugin's attributes. Of long rows in fp32 it adds squares less exactly than PyTorch."""
    node = helper.make_node(op.OP, op.INPUTS, ["hidden", "normed"], domain=op.DOMAIN, eps=case.eps, launch="unused")
    whole, inputs = ["b", "s", case.dim], case.inputs()
    given = {name: (t, whole if t.ndim == 3 else [case.dim]) for name, t in zip(op.INPUTS, inputs, strict=True)}
    made = dict.fromkeys(("hidden", "normed"), (inputs[0].dtype, whole))
    got = run_bodies([node], [op.function_body()], given, made)
    check(got, case, inputs, f"body {case}")
    with pytest.raises(AssertionError, match="expected at most"):
        check([got[0], got[1] * 1.02], case, inputs, "2 % too much")


def test_launch_description():
    attributes = op.compile_cubins(["sm89"], "bf16", 2304, EPS)
    launch, dims = Launch.from_json(attributes["launch"]), [(2, 300, 2304), (2, 300, 2304), (2304,), (2304,)]
    assert [evaluate(size, dims) for size in launch.grid] == [600, 1, 1]
    assert [[evaluate(size, dims) for size in output.shape] for output in launch.outputs] == [[2, 300, 2304]] * 2
    assert launch.args[:7] == [["in", 0], ["in", 1], ["in", 2], ["in", 3], ["out", 0], ["out", 1], ["f32", EPS]]
    assert launch.inputs == ["bf16"] * 4


SLOW = [
    (sm, dtype) for sm in ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120") for dtype in DTYPES if (sm, dtype) != ("sm80", "bf16")
]


@pytest.mark.parametrize(("target", "dtype"), [("sm80", "bf16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_cubins(target, dtype):
    attributes = op.compile_cubins([target], dtype, 2304, EPS)
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"


def test_bad_arguments():
    with pytest.raises(ValueError, match="got dtype 'int8'; expected one of"):
        op.compile_cubins(["sm89"], "int8", 8, EPS)
    with pytest.raises(ValueError, match="got rows of 0 channels; expected at least 1"):
        op.compile_cubins(["sm89"], "bf16", 0, EPS)
    x, branch, branch_weight, weight = Case(1, 2, 8).inputs()
    out = torch.empty_like(x)
    for wrong in ((x, branch, branch_weight, weight.float(), (out, out)), (x, branch, branch_weight, weight, (out, out[:, :1]))):
        with pytest.raises(ValueError, match=r"expected four times \(B, S, D\) and twice \(D,\)"):
            op.launch(*wrong, EPS)
