"""The kernel (interpreted on a CPU, or on a GPU), ONNX function bodies and cubins of modulated_norm."""

import json

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.eight_bits import TARGETS_OF, assert_bits, assert_e4m3, quantized_truth
from parity.interpreter import interpret

from plugins import cubin
from plugins import modulated_norm as op
from plugins.launch import Launch, evaluate
from sana_ref import ops
from sana_ref.quantize_ops import round_static

INTERPRETED = ("fp16", "fp32")  # not bf16, on a GPU only: Triton 3.9's interpreter cuts off where a GPU rounds to nearest
EPS = 1e-6
FIRST = (0, 1, 5)  # rows of a block's first norm: shift, scale, and the gate of the feed-forward before
SECOND = (3, 4)  # of its second norm
# (B, N, D), rows, R of the modulation's time, RMSNorm?: published widths, odd ones, one token, one channel, one time for all rows
CASES = [
    ((2, 3, 2240), FIRST, 6, False),
    ((3, 7, 1152), SECOND, 6, False),
    ((2, 5, 70), (0, 1, 5), 1, False),
    ((2, 5, 33), FIRST, 6, True),
    ((1, 1, 16), SECOND, 6, True),
    ((2, 2, 1), (1, 0), 1, False),
]


def tensors(case, dtype):
    """x, branch, time, table and, for a gate, gate_time, gate_table. Means are not zero, so that a norm without one would show."""
    (batch, tokens, dim), rows, time_rows, _ = case
    generator = torch.Generator().manual_seed(dim)
    sizes = [(batch, tokens, dim)] * 2 + [(batch, time_rows * dim), (6, dim)] + [(batch, 6 * dim), (6, dim)] * (len(rows) - 2)
    return [(torch.randn(size, generator=generator) + 0.5 * (i == 0)).to(DTYPES[dtype]) for i, size in enumerate(sizes)]


def call(function, case, given):
    x, branch, time, table, *gate = given
    return function(x, branch, (time, table), tuple(gate) or None, case[1], rms=case[3], eps=EPS)


def check(got, case, given, name):
    same, exact = call(ops.modulated_norm_truth, case, given), call(ops.modulated_norm_truth, case, [t.double() for t in given])
    for part, one, peer, answer in zip(("hidden", "normed"), got, same, exact, strict=True):
        assert one.dtype == peer.dtype
        assert_parity(one.cpu(), same=peer.cpu(), exact=answer.cpu(), name=f"{name}: {part}")


def check_quantized(got, case, given, name):
    """got: hidden, bits, scale."""
    same, exact = (
        call(ops.modulated_norm_truth, case, [t.cpu().to(wide) for t in given]) for wide in (given[0].dtype, torch.float64)
    )
    hidden, bits, scale = (each.cpu() for each in got)
    assert_parity(hidden, same=same[0], exact=exact[0], name=f"{name}: hidden")
    quotient, wide_scale = quantized_truth(exact[1])
    assert scale.dtype == torch.float32
    # Sums and a norm cost a few of fp32's units of 2^-23: 2^-20 of a value or, where scale and shift cancel, of the row's largest.
    # Of 448 that is less than a quarter of the step between e4m3's smallest numbers. Rounding to fp16 before would cost 2^-11.
    torch.testing.assert_close(scale.double(), wide_scale, rtol=2.0**-20, atol=0)
    assert_e4m3(bits, quotient, (quotient.abs() + 448) * 2.0**-20, f"{name}: bits")


LARGEST = {"int8": 127, "e4m3": 448}
STATIC = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}  # normed with one scale


def static_scale(case, given, kind):
    """Half of what would do, so that the largest numbers are cut off."""
    exact = call(ops.modulated_norm_truth, case, [t.cpu().double() for t in given])[1]
    return (exact.abs().max() / LARGEST[kind] / 2).float().item()


def check_static(kind, got, case, given, name):
    """got: hidden, and normed's bits, int8."""
    same, exact = (
        call(ops.modulated_norm_truth, case, [t.cpu().to(wide) for t in given]) for wide in (given[0].dtype, torch.float64)
    )
    hidden, bits = (each.cpu() for each in got)
    assert_parity(hidden, same=same[0], exact=exact[0], name=f"{name}: hidden")
    quotient = exact[1] / static_scale(case, given, kind)
    # As above; of 127 that is less than a thousandth of a step.
    tolerance = (quotient.abs() + LARGEST[kind]) * 2.0**-20
    assert_bits("int8" if kind == "int8" else "fp8", bits, quotient, tolerance, f"{name}: bits", least=-128.0)
    numbers = bits.view(STATIC[kind]).float()
    assert (numbers == LARGEST[kind]).any() or (numbers < -LARGEST[kind]).any() or (numbers == -LARGEST[kind]).any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_truth(case):
    """Operator by operator, as a block has it."""
    x, branch, time, table, *gate = given = [t.double() for t in tensors(case, "fp32")]
    (batch, _, dim), (shift, scale, *gate_row), _, rms = case
    rows = table[None] + time.reshape(batch, -1, dim)
    if gate:
        branch = (gate[1][None] + gate[0].reshape(batch, -1, dim))[:, gate_row] * branch
    hidden = x + branch
    centred = hidden if rms else hidden - hidden.mean(-1, keepdim=True)
    norm = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(call(ops.modulated_norm, case, given), (hidden, norm * (1 + rows[:, [scale]]) + rows[:, [shift]]))


def test_the_norm_is_that_of_the_unrounded_sum():
    """2048 + 0.25 is 2048 in fp16: of the rounded sum every value would be the mean."""
    x, branch = torch.full((1, 1, 64), 2048.0).half(), torch.tensor([0.25, -0.25]).repeat(32)[None, None].half()
    zeros = torch.zeros(1, 64).half(), torch.zeros(2, 64).half()
    hidden, normed = ops.modulated_norm(x, branch, zeros, None, (0, 1), eps=EPS)
    assert torch.equal(hidden, x)
    torch.testing.assert_close(normed, branch * 4, rtol=1e-3, atol=0)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_registration(case):
    x, branch, time, table, *gate = tensors(case, "fp32")
    arguments = (x.mT.contiguous().mT, branch, time, table, *(gate or (None, None)), case[1], case[3], EPS)
    torch.library.opcheck(torch.ops.sana.modulated_norm.default, arguments)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"branch": (2, 4, 32)}, SECOND),
        ({"time": (2, 64)}, SECOND),
        ({"table": (6, 32)}, SECOND),
        ({}, (3, 6)),
        ({}, (0, 1, 5)),
        ({"x": (6, 33), "branch": (6, 33)}, SECOND),
    ],
    ids=str,
)
def test_wrong_shapes(change, rows):
    sizes = {"x": (2, 3, 33), "branch": (2, 3, 33), "time": (2, 6 * 33), "table": (6, 33)} | change
    x, branch, time, table = (torch.ones(size) for size in sizes.values())
    with pytest.raises(ValueError, match=r"modulated_norm: got .* expected x and branch \(B, N, D\)"):
        ops.modulated_norm(x, branch, (time, table), None, rows, eps=EPS)


LAUNCH = f"""
import torch
from plugins import modulated_norm as kernel
def launch(out, x, branch, time, table, *rest, rows, rms, quantized=False, kind=None, out_scale=None):
    *gate, result = rest
    outputs = result[0], result[1]
    if quantized or kind:
        outputs = torch.full_like(x, float("nan")), torch.full(x.shape, -1, dtype=torch.int8), torch.full(x.shape[:2], float("nan"))
    written = outputs
    if kind:
        written = outputs[0], outputs[1].view({{"int8": torch.int8, "e4m3": torch.float8_e4m3fn}}[kind])
    kernel.launch(x, branch, (time, table), tuple(gate) or None, written, rows=rows, rms=rms, eps={EPS}, out_scale=out_scale)
    if len(outputs) == 3:
        result[0], result[1, ..., :-1], result[1, ..., -1] = torch.nn.functional.pad(outputs[0], (0, 1)), outputs[1], outputs[2]
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(hidden, normed) by case and dtype, all from one process; "wrong": the first case with scale and shift exchanged.

    By case, dtype and "quantized" or one of STATIC: what `unpacked` takes apart, fp32 (2, B, N, D + 1). "ties": so, of `tied`.
    """
    folder = tmp_path_factory.mktemp("launch")
    (folder / "norm_launch.py").write_text(LAUNCH)
    named = [(case, dtype) for case in CASES for dtype in INTERPRETED]
    calls = []
    for case, dtype in named:
        out = torch.empty(2, *case[0], dtype=DTYPES[dtype])
        calls.append(((out, *tensors(case, dtype)), {"rows": case[1], "rms": case[3]}))
    calls.append((calls[0][0], {"rows": (1, 0, 5), "rms": False}))
    named.append("wrong")
    for case in CASES:
        for dtype in INTERPRETED:
            out = torch.empty(2, *case[0][:2], case[0][2] + 1)
            calls.append(((out, *tensors(case, dtype)), {"rows": case[1], "rms": case[3], "quantized": True}))
            named.append((case, dtype, "quantized"))
            for kind in STATIC:
                scale = static_scale(case, tensors(case, dtype), kind)
                calls.append((calls[-1][0], {"rows": case[1], "rms": case[3], "kind": kind, "out_scale": scale}))
                named.append((case, dtype, kind))
    calls.append(
        ((torch.empty(2, 1, 3, len(TIES) + 1), *tied()), {"rows": SECOND, "rms": False, "kind": "int8", "out_scale": TIES_SCALE})
    )
    named.append("ties")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("norm_launch:launch", calls)
    return dict(zip(named, outputs, strict=True))


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(interpreted, case, dtype):
    check(interpreted[case, dtype], case, tensors(case, dtype), f"kernel {case} {dtype}")


def unpacked(out, dtype):
    """(hidden, bits, scale) of a "quantized" output of `interpreted`: hidden and a column of zeros, bits and a column of scales."""
    return out[0, ..., :-1].to(DTYPES[dtype]), out[1, ..., :-1].to(torch.int8), out[1, ..., -1]


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_kernel(interpreted, case, dtype):
    got = unpacked(interpreted[case, dtype, "quantized"], dtype)
    check_quantized(got, case, tensors(case, dtype), f"kernel {case} {dtype}")
    assert torch.equal(got[0], interpreted[case, dtype][0])


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_static_kernel(interpreted, case, dtype, kind):
    hidden, bits, _ = unpacked(interpreted[case, dtype, kind], dtype)
    check_static(kind, (hidden, bits), case, tensors(case, dtype), f"kernel {case} {dtype}")
    assert torch.equal(hidden, interpreted[case, dtype][0])


TIES_SCALE = 0.5
TIES = torch.arange(-280, 280) / 4  # over the scale: halves, and beyond what INT8 has on both sides


def tied():
    """Inputs with a factor 1 + scale of 0, so that normed is the shift, TIES, to the last bit."""
    time = torch.zeros(1, 6, len(TIES))
    time[0, SECOND[0]], time[0, SECOND[1]] = TIES, -1.0
    x = torch.randn(1, 3, len(TIES), generator=torch.Generator().manual_seed(0))
    return [x, x.flip(1), time.flatten(1), torch.zeros(6, len(TIES))]


def test_ties(interpreted):
    """As PyTorch's simulation has them, of both signs, and what is too large."""
    _, numbers, _ = unpacked(interpreted["ties"], "fp32")
    assert torch.equal(numbers * TIES_SCALE, round_static(TIES.expand(1, 3, -1), "int8", TIES_SCALE))
    assert {-128, -127, 0, 127} <= set(numbers.flatten().tolist())


def test_errors_of_quantized_kernels_are_caught(interpreted):
    case, given = CASES[0], tensors(CASES[0], "fp16")
    hidden, bits, scale = unpacked(interpreted[case, "fp16", "quantized"], "fp16")
    rounded = call(ops.modulated_norm_truth, case, [t.double() for t in given])[1].half().double()
    early = (rounded / scale[..., None].double()).to(torch.float8_e4m3fn).view(torch.int8)
    for wrong in (early, bits.roll(1, -1)):
        with pytest.raises(AssertionError, match="values are wrong"):
            check_quantized((hidden, wrong, scale), case, given, "wrong")
    with pytest.raises(AssertionError, match="not close"):
        check_quantized((hidden, bits, scale * 1.001), case, given, "wrong")
    hidden, numbers, _ = unpacked(interpreted[case, "fp16", "int8"], "fp16")
    early = (rounded / static_scale(case, given, "int8")).round().clamp(-128, 127).to(torch.int8)
    for wrong in (early, numbers.roll(1, -1)):
        with pytest.raises(AssertionError, match="values are wrong"):
            check_static("int8", (hidden, wrong), case, given, "wrong")


def test_planted_error_is_caught(interpreted):
    with pytest.raises(AssertionError, match=r"normed: .* expected at most"):
        check(interpreted["wrong"], CASES[0], tensors(CASES[0], "fp16"), "rows exchanged")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, ((2, 4096, 2240), FIRST, 6, False)], ids=str)
def test_op_on_gpu(case, dtype):
    given = [t.cuda() for t in tensors(case, dtype)]
    got = call(ops.modulated_norm, case, given)
    if given[0].numel() >= 256:  # of fewer numbers, twice another's error is no measure: 16 of them once had 2.1 times it
        check(got, case, given, f"op {case} {dtype}")
    assert all(torch.equal(one, other) for one, other in zip(got, call(ops.modulated_norm, case, given), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, ((2, 1024, 2240), FIRST, 6, False)], ids=str)
def test_quantized_kernel_on_gpu(case, dtype):
    """Where the conversion to e4m3 is the hardware's."""
    x, branch, time, table, *gate = given = [t.cuda() for t in tensors(case, dtype)]
    bits, scale = torch.full_like(x, -1, dtype=torch.int8), torch.full_like(x[..., 0], float("nan"), dtype=torch.float32)
    got = torch.full_like(x, float("nan")), bits, scale
    op.launch(x, branch, (time, table), tuple(gate) or None, got, rows=case[1], rms=case[3], eps=EPS)
    check_quantized(got, case, given, f"kernel {case} {dtype}")
    for kind, stored in STATIC.items():
        hidden, bits = torch.full_like(x, float("nan")), torch.full_like(bits, -1)
        options = {"rows": case[1], "rms": case[3], "eps": EPS, "out_scale": static_scale(case, given, kind)}
        op.launch(x, branch, (time, table), tuple(gate) or None, (hidden, bits.view(stored)), **options)
        check_static(kind, (hidden, bits), case, given, f"kernel {case} {dtype} {kind}")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_function_bodies(case, dtype):
    """In ONNX Runtime, with an attribute of the plugin's on the node."""
    given = tensors(case, dtype)
    name = op.PLAIN if len(case[1]) == 2 else op.GATED
    attributes = {"rows": case[1], "rms": int(case[3]), "eps": EPS, "launch": "unused"}
    node = helper.make_node(name, op.INPUTS[name], ["hidden", "normed"], domain=op.DOMAIN, **attributes)
    free = [["b", "n"]] * 2 + [["b"], [6]] * 2
    fed = {each: (t, [*sizes, t.shape[-1]]) for each, sizes, t in zip(op.INPUTS[name], free, given, strict=False)}
    made = dict.fromkeys(("hidden", "normed"), (given[0].dtype, ["b", "n", case[0][2]]))
    got = run_bodies([node], [op.function_body(name)], fed, made)
    check(got, case, given, f"body {case} {dtype}")
    with pytest.raises(AssertionError, match=r"normed: .* expected at most"):
        check([got[0], got[1] * 1.02], case, given, "2 % too much")


@pytest.mark.parametrize("rows", [FIRST, SECOND], ids=str)
@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
def test_cubins(target, rows):
    """What the plugin computes from the JSON: a program for each token, and the pointers in the kernel's order."""
    variant = op.Variant(dim=2240, rows=rows, time_rows=6, gate_time_rows=6)
    for dtype in DTYPES:
        attributes = op.compile_cubins([target], dtype, variant, EPS)
        launch = Launch.from_json(attributes["launch"])
        assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
        assert (launch.op, launch.inputs) == (variant.op, [dtype] * len(op.INPUTS[variant.op]))
        dims = [(2, 1024, 2240)] * 2 + [(2, 6 * 2240), (6, 2240)] * (len(rows) - 1)
        assert [evaluate(size, dims) for size in launch.grid] == [2 * 1024, 1, 1]
        assert [[evaluate(size, dims) for size in output.shape] for output in launch.outputs] == [[2, 1024, 2240]] * 2
        gate = [4, 5] if len(rows) == 3 else [2, 3]
        args = json.loads(launch.to_json())["args"]
        assert args[:8] == [*(["in", i] for i in (0, 1, 2, 3, *gate)), ["out", 0], ["out", 1]]
        assert args[8:10] == [["i32", ["dim", 0, 1]], ["f32", EPS]]


@pytest.mark.parametrize("rows", [FIRST, SECOND], ids=str)
@pytest.mark.parametrize("target", ["sm89", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm90", "sm100", "sm120"))])
def test_quantized_cubins(target, rows):
    variant = op.Variant(dim=2240, rows=rows, time_rows=6, gate_time_rows=6, quantized="fp8")
    for dtype in DTYPES:
        attributes = op.compile_cubins([target], dtype, variant, EPS)
        launch = Launch.from_json(attributes["launch"])
        assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
        assert (launch.op, launch.inputs) == (variant.op, [dtype] * len(op.INPUTS[variant.op]))
        dims = [(2, 1024, 2240)] * 2 + [(2, 6 * 2240), (6, 2240)] * (len(rows) - 1)
        assert [output.type for output in launch.outputs] == [dtype, "int8", "fp32"]
        shapes = [[evaluate(size, dims) for size in output.shape] for output in launch.outputs]
        assert shapes == [[2, 1024, 2240], [2, 1024, 2240], [2, 1024]]
        args = json.loads(launch.to_json())["args"]
        assert args[6:11] == [["out", 0], ["out", 1], ["out", 2], ["i32", ["dim", 0, 1]], ["f32", EPS]]


QUICK = [("int8", "sm80"), ("e4m3", "sm89")]
# What quantises is the same code with either rows: one of them is enough elsewhere.
SLOW = [(kind, sm, FIRST) for kind, of in (("int8", "int8"), ("e4m3", "fp8")) for sm in TARGETS_OF[of] if (kind, sm) not in QUICK]


@pytest.mark.parametrize(
    ("kind", "target", "rows"),
    [
        *((*each, rows) for each in QUICK for rows in (FIRST, SECOND)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (*SLOW, ("int8", "sm120", SECOND))),
    ],
)
def test_static_cubins(kind, target, rows):
    """As the plain ones, with the scale behind eps, and no tensor of scales."""
    variant = op.Variant(dim=2240, rows=rows, time_rows=6, gate_time_rows=6, quantized=kind)
    attributes = op.compile_cubins([target], "fp16", variant, EPS, 0.25)
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    assert [output.type for output in launch.outputs] == ["fp16", {"int8": "int8", "e4m3": "fp8"}[kind]]
    args = json.loads(launch.to_json())["args"]
    assert args[6:11] == [["out", 0], ["out", 1], ["i32", ["dim", 0, 1]], ["f32", EPS], ["f32", 0.25]]
    for wrong in ((variant, None), (op.Variant(dim=2240, rows=SECOND, time_rows=6), 0.25)):
        with pytest.raises(ValueError, match=r"out_scale .*; expected one for int8 and e4m3 alone"):
            op.compile_cubins([target], "fp16", wrong[0], EPS, wrong[1])


@pytest.mark.parametrize(("dim", "warps", "fp8_warps"), [(1, 1, 1), (16, 1, 1), (1152, 2, 1), (2240, 4, 2), (20000, 16, 16)])
def test_warps(dim, warps, fp8_warps):
    for kind, expected in ((None, warps), ("int8", warps), ("fp8", fp8_warps)):
        assert op.Variant(dim=dim, rows=SECOND, time_rows=6, quantized=kind).num_warps == expected


def test_bad_arguments():
    with pytest.raises(ValueError, match="got dtype 'int8'; expected one of fp16, bf16, fp32"):
        op.compile_cubins(["sm89"], "int8", op.Variant(dim=16, rows=SECOND, time_rows=6), EPS)
    for wrong in ({"rows": (3,)}, {"rows": (3, 6)}, {"rows": (0, 1, 2), "gate_time_rows": 2}, {"dim": 0}, {"rows": (-1, 0)}):
        with pytest.raises(ValueError, match=r"got Variant\(.*expected rows of shift, scale and maybe a gate"):
            op.Variant(**{"dim": 16, "rows": SECOND, "time_rows": 6} | wrong)
    ones = torch.ones(1, 2, 16)
    with pytest.raises(ValueError, match=r"expected one shape \(B, N, D\), dtype and device, all contiguous"):
        op.launch(ones, ones[:, :1], (ones[0], ones[0]), None, (ones, ones), rows=SECOND, rms=False, eps=EPS)
    bits, scale = ones.to(torch.int8), ones[..., 0].contiguous()
    for outputs in ((ones, bits), (ones, ones, scale), (ones, bits, scale.half()), (ones, bits, scale[:, :1]), (ones,)):
        with pytest.raises(ValueError, match=r"or \(B, N, D\) int8 and \(B, N\) fp32 in place of normed"):
            op.launch(ones, ones, (ones[0], ones[0]), None, outputs, rows=SECOND, rms=False, eps=EPS)
    for outputs, scale_of_all in (((ones, ones), 1.0), ((ones, bits), 0.0), ((ones, bits, scale), 1.0)):
        with pytest.raises(ValueError, match=r"or \(B, N, D\) int8 or e4m3 alone and a scale above 0"):
            op.launch(ones, ones, (ones[0], ones[0]), None, outputs, rows=SECOND, rms=False, eps=EPS, out_scale=scale_of_all)
    table, times = torch.ones(6, 16), torch.ones(1, 96)
    right = times, table
    for wrong in ((times[:, :32], table), (torch.ones(2, 96), table), (times, table[:4]), (times, table[:, :8])):
        for modulation, gate in ((wrong, right), (right, wrong)):
            with pytest.raises(ValueError, match=r"expected \(B, R D\) or \(B, D\) and \(R, D\), B 1, D 16, with those rows"):
                op.launch(ones, ones, modulation, gate, (ones, ones), rows=(3, 4, 5), rms=False, eps=EPS)
    for old in (sm for sm in cubin.CAPABILITIES if sm < 89):
        with pytest.raises(ValueError, match=f"ModulatedNorm: got target sm{old}; expected sm89 or newer"):
            op.compile_cubins([f"sm{old}"], "fp16", op.Variant(dim=16, rows=SECOND, time_rows=6, quantized="fp8"), EPS)
        with pytest.raises(ValueError, match=f"ModulatedNorm: got target sm{old}; expected sm89 or newer"):
            op.compile_cubins([f"sm{old}"], "fp16", op.Variant(dim=16, rows=SECOND, time_rows=6, quantized="e4m3"), EPS, 1.0)
