"""The kernel (interpreted on a CPU, or on a GPU) and cubins of gated_sum."""

import json

import pytest
import torch
from parity.bound import assert_parity
from parity.eight_bits import assert_e4m3, quantized_truth
from parity.interpreter import interpret

from plugins import cubin
from plugins import gated_sum as op
from plugins.launch import Launch, evaluate

CASES = [((2, 5, 70), 2), ((1, 1, 1), 0), ((3, 2, 2240), 5)]  # (B, N, D), row of the gate


def tensors(case):
    """x, branch, time, table. Of branch some numbers are infinite, as where a product in fp16 overflowed."""
    (batch, tokens, dim), _ = case
    generator = torch.Generator().manual_seed(dim)
    sizes = ((batch, tokens, dim), (batch, tokens, dim), (batch, 6 * dim), (6, dim))
    x, branch, time, table = (torch.randn(size, generator=generator) for size in sizes)
    if dim > 3:
        time[0], table[:, 2:4] = 0.01 * time[0], 0.01 * table[:, 2:4]  # so that 65504 times the gate is no infinity itself
        branch[0, 0, 2], branch[0, 0, 3] = torch.inf, -torch.inf
    return [t.half() for t in (x, branch, time, table)]


def check(got, case, given, name):
    """got: hidden, bits, scale."""
    hidden, bits, scale = (t.cpu() for t in got)
    given = [t.cpu() for t in given]
    same, exact = (op.gated_sum_truth(*(t.to(kind) for t in given), case[1]) for kind in (torch.float16, torch.float64))
    assert exact.isfinite().all()
    rest = torch.ones_like(exact, dtype=torch.bool)
    rest[exact.abs() > 100] = False  # else one large number's rounding would be the bound of all others
    for chosen in (rest, ~rest):
        if chosen.any():
            assert_parity(hidden[chosen], same=same[chosen], exact=exact[chosen], name=f"{name}: hidden")
    quotient, largest = quantized_truth(hidden)
    torch.testing.assert_close(scale, largest, rtol=0, atol=0)
    assert_e4m3(bits, quotient, quotient.abs() * 2.0**-22, f"{name}: bits")


LAUNCH = """
import torch
from plugins import gated_sum as kernel
def launch(out, x, branch, time, table, result, row):
    hidden, bits = torch.full_like(x, float("nan")), torch.full(x.shape, -1, dtype=torch.int8)
    scale = torch.full(x.shape[:-1], float("nan"))
    kernel.launch((x, branch, time, table), (hidden, bits, scale), row)
    result[0, ..., :-1], result[1, ..., :-1], result[1, ..., -1] = hidden, bits, scale
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(hidden, bits, scale) by name: each case; "row": the first with another gate; "nan": one NaN in its branch."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "sum_launch.py").write_text(LAUNCH)
    poisoned = tensors(CASES[0])
    poisoned[1][0, 0, 5] = torch.nan
    named = [(case, tensors(case), case[1]) for case in CASES]
    named += [("row", tensors(CASES[0]), CASES[0][1] - 1), ("nan", poisoned, CASES[0][1])]
    calls = [((torch.empty(2, *t[0].shape[:2], t[0].shape[2] + 1), *t), {"row": row}) for _, t, row in named]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("sum_launch:launch", calls)
    return {
        name: (out[0, ..., :-1].half(), out[1, ..., :-1].to(torch.int8), out[1, ..., -1])
        for (name, _, _), out in zip(named, outputs, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(interpreted, case):
    check(interpreted[case], case, tensors(case), f"kernel {case}")


def test_planted_errors_are_caught(interpreted):
    case, given = CASES[0], tensors(CASES[0])
    with pytest.raises(AssertionError, match=r"hidden: .* expected at most"):
        check(interpreted["row"], case, given, "another gate")
    hidden, bits, scale = interpreted[case]
    with pytest.raises(AssertionError, match="values are wrong"):
        check((hidden, bits.roll(1, -1), scale), case, given, "another place")


def test_a_nan_stays_one(interpreted):
    hidden, bits, scale = interpreted["nan"]
    assert hidden.isnan().nonzero().tolist() == [[0, 0, 5]]
    assert scale.isnan().nonzero().tolist() == [[0, 0]]
    assert bits[0, 0].view(torch.float8_e4m3fn).float().isnan().all()
    assert torch.equal(bits[0, 1:], interpreted[CASES[0]][1][0, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", [*CASES, ((2, 1024, 2240), 2)], ids=str)
def test_kernel_on_gpu(case):
    """Where the conversion to e4m3 is the hardware's."""
    x, *rest = (t.cuda() for t in tensors(case))
    bits, scale = torch.full_like(x, -1, dtype=torch.int8), torch.full_like(x[..., 0], torch.nan, dtype=torch.float32)
    got = torch.full_like(x, torch.nan), bits, scale
    op.launch((x, *rest), got, case[1])
    check(got, case, (x, *rest), f"kernel {case}")


@pytest.mark.parametrize("target", ["sm89", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm90", "sm100", "sm120"))])
def test_cubins(target):
    """What the plugin computes from the JSON: a program for each token, and the pointers in the kernel's order."""
    attributes = op.compile_cubins([target], 2240, 2, 6)
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    assert (launch.op, launch.inputs, [output.type for output in launch.outputs]) == (op.OP, ["fp16"] * 4, ["fp16", "int8", "fp32"])
    dims = [(2, 1024, 2240)] * 2 + [(2, 6 * 2240), (6, 2240)]
    assert [evaluate(size, dims) for size in launch.grid] == [2 * 1024, 1, 1]
    shapes = [[evaluate(size, dims) for size in output.shape] for output in launch.outputs]
    assert shapes == [[2, 1024, 2240], [2, 1024, 2240], [2, 1024]]
    args = json.loads(launch.to_json())["args"]
    assert args[:8] == [*(["in", i] for i in range(4)), *(["out", i] for i in range(3)), ["i32", ["dim", 0, 1]]]


def test_bad_arguments():
    for dim, row, rows in ((0, 2, 6), (64, 6, 6), (64, -1, 6)):
        with pytest.raises(ValueError, match=f"got rows of {dim} channels, gate {row} of {rows}"):
            op.compile_cubins(["sm89"], dim, row, rows)
    for old in (sm for sm in cubin.CAPABILITIES if sm < 89):
        with pytest.raises(ValueError, match=f"Fp8GatedSum: got target sm{old}; expected sm89 or newer"):
            op.compile_cubins(["sm90", f"sm{old}"], 64, 2, 6)
    given = tensors(CASES[0])
    x = given[0]
    outputs = (x.clone(), torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:2]))
    for wrong in ((x.float(), *outputs[1:]), (outputs[0], x, outputs[2]), (*outputs[:2], outputs[2][:1])):
        with pytest.raises(ValueError, match=r"expected twice \(B, N, D\), \(B, R D\), \(R, D\)"):
            op.launch(tuple(given), wrong, 2)
    with pytest.raises(ValueError, match="all contiguous"):
        op.launch((x.mT.contiguous().mT, *given[1:]), outputs, 2)
