"""Kernels that quantise with a given scale: bits and FP8's scales of each (interpreted on a CPU, or on a GPU), and their cubins."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity.eight_bits import TARGETS_OF, assert_bits
from parity.interpreter import interpret

from plugins import cross_attention, gated_depthwise_conv, qkv_linear_attention
from plugins.eight_bits import LARGEST
from plugins.launch import Launch, evaluate
from sana_ref import attention_ops, ops
from sana_ref.quantize_ops import round_static

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
KINDS = {"fp8": "fp8", "int8": "int8", "e4m3": "fp8"}  # of outputs; and of their numbers
BLOCK, HEADS = 1, 2
# By op: the shape of its inputs and of its output. Odd sizes: masks of tokens, columns, channels and heads take part.
SHAPES = {
    "cross": ([(2, 70, 2 * 20), (2, 2, 1, HEADS, 33, 20), (2, 2, 1, HEADS, 33, 20), (2, 33)], (2, 70, 2 * 20)),
    "cross in parts": ([(2, 130, 2 * 39), (2, 2, 1, HEADS, 33, 39), (2, 2, 1, HEADS, 33, 39), (2, 33)], (2, 130, 2 * 39)),
    "linear": ([(2, 70, 3 * HEADS * 32)], (2, 70, HEADS * 32)),
    "conv": ([(2, 3, 5, 2 * 70), (3, 3, 2 * 70), (2 * 70,)], (2, 3, 5, 70)),
}


def truth(name, tensors, heads=HEADS):
    if name.startswith("cross"):
        return attention_ops.cross_attention_truth(*tensors, BLOCK)
    if name == "linear":
        return ops.qkv_linear_attention_truth(tensors[0], heads)
    x, weight, bias = tensors
    filters = weight.permute(2, 0, 1)[:, None]
    a, g = F.conv2d(F.silu(x.permute(0, 3, 1, 2)), filters, bias, padding=1, groups=len(filters)).chunk(2, dim=1)
    return (a * F.silu(g)).permute(0, 2, 3, 1)


def inputs(name, dtype):
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in SHAPES[name][0]]


def scale_of(name, dtype, kind):
    """Half of what would do: the largest numbers are cut off."""
    exact = truth(name, [t.double() for t in inputs(name, dtype)])
    return (exact.abs().max() / LARGEST[KINDS[kind]] / 2).float().item()


def check(bits, scales, name, dtype, kind, label):
    given, scale = inputs(name, dtype), scale_of(name, dtype, kind)
    same, exact = truth(name, given).double(), truth(name, [t.double() for t in given])
    if kind == "fp8":
        assert (scales == torch.tensor(scale)).all(), f"{label}: got scales {scales.unique()}; expected {scale} everywhere"
    # The project's bound: twice PyTorch's own error at this precision; and the two roundings of a number times a reciprocal.
    tolerance = 2 * (same - exact).abs().max() / scale + (exact / scale).abs() * 2.0**-21
    assert_bits(KINDS[kind], bits, exact / scale, tolerance, label, least=-128.0)
    if KINDS[kind] == "fp8":
        assert (bits.view(torch.float8_e4m3fn).float().abs() == 448).any()
    else:
        assert (bits == 127).any() or (bits == -128).any()


LAUNCH = f"""
import torch
from plugins import cross_attention, gated_depthwise_conv, qkv_linear_attention
def run(name, kind, tensors, bits, scales, scale, heads={HEADS}):
    quantized = scales if kind == "fp8" else None, scale
    bits = bits.view(torch.float8_e4m3fn) if kind == "e4m3" else bits
    if name.startswith("cross"):
        cross_attention.launch(*tensors, bits, {BLOCK}, quantized)
    elif name == "linear":
        qkv_linear_attention.launch(*tensors, bits, heads, quantized=quantized)
    else:
        gated_depthwise_conv.launch(*tensors, bits, quantized)
def launch(out, *tensors, name, kind, scale, heads={HEADS}):
    gated_depthwise_conv.BLOCK_C = 64  # several programs for the channels
    *tensors, result = tensors
    bits, scales = torch.full(out[..., 1:].shape, -1, dtype=torch.int8), torch.full(out.shape[:-1], float("nan"))  # -1: NaN's bits
    run(name, kind, tensors, bits, scales, scale, heads)
    result[..., :-1], result[..., -1] = bits, scales
"""


def poisoned(name):
    """fp32 inputs with one NaN."""
    tensors = inputs(name, "fp32")
    tensors[0].view(-1)[0] = torch.nan
    return tensors


SCALE = 0.5  # of TIES
TIES = torch.arange(-280, 280) / 4  # over the scale: halves, and beyond what INT8 has on both sides


def tied(name):
    """Inputs of which the op makes TIES, to the last bit."""
    dim = len(TIES)
    if name == "cross":  # one key, whose value comes out
        values = TIES.expand(2, 2, 1, dim).reshape(2, 2, 1, 5, 1, dim // 5).contiguous()
        return [torch.randn(2, 3, dim), torch.zeros_like(values), values, torch.zeros(2, 1)]
    if name == "linear":  # one token, whose value comes out; heads of 32 channels
        v = torch.nn.functional.pad(TIES, (0, -dim % 64))
        return [torch.cat([torch.ones(2 * len(v)), v])[None, None]]
    bias = torch.cat([TIES / 128, torch.full((dim,), 128.0)])  # silu(128) is 128
    return [torch.randn(1, 2, 5, 2 * dim), torch.zeros(3, 3, 2 * dim), bias]


# Of a channel of the mix-FFN's middle, by its middle tap: a and g, of which some are beyond fp16.
LARGE = torch.tensor([(120000, 0.3), (-120000, 0.3), (12, -210000), (300000, -300), (3, 15000), (0.5, 90000), (-30, 30)])


def large():
    """fp16 inputs of which it makes a and g of LARGE."""
    filters = torch.zeros(3, 3, 2 * len(LARGE))
    filters[1, 1] = LARGE.T.flatten() / 300
    return [t.half() for t in (torch.full((1, 2, 5, 2 * len(LARGE)), 300.0), filters, torch.zeros(2 * len(LARGE)))]


OPS = ("cross", "linear", "conv")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(bits, scales) by kind, op and dtype; by kind, op and "nan", of `poisoned`; of INT8 by op and "ties", of `tied`."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "static_launch.py").write_text(LAUNCH)
    calls = {}

    def add(kind, name, label, tensors, shape, scale, **options):
        out = torch.empty(*shape[:-1], shape[-1] + 1)
        calls[kind, name, label] = (out, *tensors), {"name": name, "kind": kind, "scale": scale} | options

    for kind in KINDS:
        for name, (_, shape) in SHAPES.items():
            for dtype in DTYPES:
                add(kind, name, dtype, inputs(name, dtype), shape, scale_of(name, dtype, kind))
            add(kind, name, "nan", poisoned(name), shape, scale_of(name, "fp32", kind))
    exact = truth("conv", [t.double() for t in large()])
    add("fp8", "conv", "large", large(), exact.shape, (exact.abs().max() / 448).item())
    for name in OPS:
        tensors = tied(name)
        shape = truth(name, tensors, heads=heads_of(tensors)).shape if name == "linear" else truth(name, tensors).shape
        options = {"heads": heads_of(tensors)} if name == "linear" else {}
        add("int8", name, "ties", tensors, shape, SCALE, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("static_launch:launch", [*calls.values()])
    return {key: (out[..., :-1].to(torch.int8), out[..., -1]) for key, out in zip(calls, outputs, strict=True)}


def heads_of(tensors):
    return tensors[0].shape[-1] // 3 // 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel(interpreted, name, dtype, kind):
    check(*interpreted[kind, name, dtype], name, dtype, kind, f"kernel {name} {dtype} {kind}")


@pytest.mark.parametrize("name", OPS)
def test_ties(interpreted, name):
    """As PyTorch's simulation has them, of both signs, and what is too large."""
    exact = truth(name, tied(name), heads_of(tied(name)))
    assert exact.flatten()[: len(TIES)].tolist() == TIES.tolist()
    bits, _ = interpreted["int8", name, "ties"]
    assert torch.equal(bits * SCALE, round_static(exact, "int8", SCALE))
    assert {-128, -127, 0, 127} <= set(bits.flatten().tolist())


def test_sums_beyond_fp16(interpreted):
    """Of e4m3's rounding, and a hundredth for small taps in fp16."""
    exact = truth("conv", [t.double() for t in large()])
    bits, scales = interpreted["fp8", "conv", "large"]
    got = bits.view(torch.float8_e4m3fn).double() * scales[..., None]
    assert ((got - exact).abs() <= exact.abs() * (2**-4 + 0.01) + scales[..., None] * 2**-10).all()


@pytest.mark.parametrize("name", SHAPES)
def test_a_nan_stays_one(interpreted, name):
    """INT8, which has none, takes the smallest number."""
    exact = truth(name, poisoned(name))
    assert exact.isnan().any()
    for kind in ("fp8", "e4m3"):
        bits, scales = interpreted[kind, name, "nan"]
        assert torch.equal(bits.view(torch.float8_e4m3fn).float().isnan(), exact.isnan())
        assert scales.isfinite().all() == (kind == "fp8")
    assert (interpreted["int8", name, "nan"][0][exact.isnan()] == -128).all()


APPLY = """
import torch
from plugins import qkv_linear_attention as op
def apply(qkv, state, out):
    bits = torch.zeros(1, 64, 32, dtype=torch.int8)
    options = {"D": 32, "PADDED": 32, "BLOCK_N": 64, "INTERLEAVED": False, "PRECISION": op.PRECISIONS["fp16"]}
    op.apply_kernel[1, 1](qkv, None, state, bits.view(torch.float8_e4m3fn), None, 1, 64, 64, 1, op.EPS, 1.0, **options)
    out[..., :32] = bits
"""


@pytest.mark.slow
def test_what_is_no_number_in_a_state_stays_so_in_tf32(tmp_path, monkeypatch):
    """A GPU's own NaN has all bits of the mantissa, and rounded up would be -0."""
    (tmp_path / "static_apply.py").write_text(APPLY)
    monkeypatch.syspath_prepend(tmp_path)
    state = torch.ones(1, 1, 1, 33, 32)
    state.view(torch.int32)[..., 3, 5] = 0x7FFFFFFF
    state[..., 4, 6], state[..., 4, 7] = torch.inf, -torch.inf
    (out,) = interpret("static_apply:apply", [((torch.ones(1, 64, 96, dtype=torch.float16), state), {})])
    found = out[..., :32].to(torch.int8).view(torch.float8_e4m3fn).float()
    assert found[0, :, 5].isnan().all()
    assert found[0, :, 6:8].unique().tolist() == [-448, 448]  # cut, as all outputs of FP8
    assert not found[..., [0, 4, 8]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_planted_errors_are_caught(interpreted, name, kind):
    bits, scales = interpreted[kind, name, "fp32"]
    with pytest.raises(AssertionError, match="values are wrong"):
        check(bits.roll(1, -1), scales, name, "fp32", kind, "another place")
    if kind == "fp8":
        with pytest.raises(AssertionError, match="everywhere"):
            check(bits, scales.index_fill(1, torch.tensor([0]), 1.0), name, "fp32", kind, "one scale")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_on_gpu(name, dtype, kind):
    """Where the conversion to e4m3, and what it does with numbers beyond 448, is the hardware's."""
    *rows, _ = shape = SHAPES[name][1]
    bits = torch.full(shape, -1, dtype=torch.int8, device="cuda")
    scales = torch.full(rows, torch.nan, device="cuda")
    names: dict[str, object] = {}
    exec(LAUNCH, names)
    given = [t.cuda() for t in inputs(name, dtype)]
    names["run"](name, kind, given, bits, scales, scale_of(name, dtype, kind))
    check(bits.cpu(), scales.cpu(), name, dtype, kind, f"kernel {name} {dtype} {kind}")


def attributes(name, targets, out_scale, out_kind="fp8"):
    bits = {"out_scale": out_scale, "out_kind": out_kind}
    if name.startswith("cross"):
        heads, head_dim = (20, 112) if name == "cross" else (16, 72)
        sizes = {"heads": heads, "n_keys": 300, "head_dim": head_dim, "block": 7}
        return cross_attention.compile_cubins(targets, "fp16", **sizes, **bits)
    if name == "linear":
        return qkv_linear_attention.compile_cubins(qkv_linear_attention.APPLY, targets, "fp16", 70, 32, **bits)
    return gated_depthwise_conv.compile_cubins(targets, "fp16", 2 * 5600, **bits)


DIMS = {
    "cross": ([(6, 65, 2240), *[(20, 2, 3, 20, 300, 112)] * 2, (6, 300)], [6, 65, 2240]),
    "cross in parts": ([(6, 130, 1152), *[(28, 2, 3, 16, 300, 72)] * 2, (6, 300)], [6, 130, 1152]),
    "linear": ([(2, 70, 3 * 2240), (2, 70, 1, 33, 32)], [2, 70, 2240]),
    "conv": ([(3, 33, 18, 2 * 5600), (3, 3, 2 * 5600), (2 * 5600,)], [3, 33, 18, 5600]),
}


QUICK = [("fp8", "sm90"), ("int8", "sm80"), ("e4m3", "sm89")]
SLOW = [(kind, sm) for kind in KINDS for sm in TARGETS_OF[KINDS[kind]] if (kind, sm) not in QUICK]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [(name, *each) for name in ("cross", "linear", "conv") for each in SLOW if name != "conv" or each[0] != "fp8"],
)
def test_other_targets(name, kind, target):
    """Every end has a cubin for every architecture that has its numbers. Heads are small, because these are compiled sooner. The
    convolution takes 2 s each: not with fp8, of which engines for SM 90 alone have nodes."""
    dtype, bits = "fp16", {"out_scale": 0.25, "out_kind": kind}
    if name == "cross":
        made = cross_attention.compile_cubins([target], dtype, heads=HEADS, n_keys=33, head_dim=16, block=BLOCK, **bits)
    elif name == "linear":
        made = qkv_linear_attention.compile_cubins(qkv_linear_attention.APPLY, [target], dtype, HEADS, 16, **bits)
    else:
        made = gated_depthwise_conv.compile_cubins([target], dtype, 2 * 70, **bits)
    assert Launch.from_json(made["launch"]).cubin(made["cubins"], target)[:4] == b"\x7fELF"


@pytest.mark.parametrize(("kind", "target"), QUICK)
@pytest.mark.parametrize("name", SHAPES)
def test_cubins(name, kind, target):
    """Pointers and numbers in the kernel's order: FP8's scales behind bits, the scale behind the other numbers."""
    made, plain = attributes(name, [target], 0.25, kind), attributes(name, [target], None)
    launch, old = (Launch.from_json(each["launch"]) for each in (made, plain))
    assert launch.cubin(made["cubins"], target)[:4] == b"\x7fELF"
    dims, shape = DIMS[name]
    types = {"fp8": ["int8", "fp32"], "int8": ["int8"], "e4m3": ["fp8"]}[kind]
    assert [output.type for output in launch.outputs] == types
    assert [[evaluate(size, dims) for size in output.shape] for output in launch.outputs] == [shape, shape[:-1]][: len(types)]
    assert (launch.inputs, launch.grid[1:]) == (old.inputs, old.grid[1:])  # the first is of channels, whose blocks may differ
    args, before = (json.loads(each.to_json())["args"] for each in (launch, old))
    wanted = [arg for arg in before if arg != ["null"]]
    if kind == "fp8":
        wanted.insert(wanted.index(["out", 0]) + 1, ["out", 1])
    assert [arg for arg in args if arg != ["null"]] == [*wanted, ["f32", 0.25]]


@pytest.mark.parametrize("kind", ["fp8", "e4m3"])
@pytest.mark.parametrize("name", SHAPES)
def test_old_targets(name, kind):
    with pytest.raises(ValueError, match="got target sm86; expected sm89 or newer"):
        attributes(name, ["sm86"], 0.25, kind)


@pytest.mark.parametrize("name", SHAPES)
def test_bad_outputs(name):
    names: dict[str, object] = {}
    exec(LAUNCH, names)
    *rows, _ = shape = SHAPES[name][1]
    bits, scales = torch.zeros(shape, dtype=torch.int8), torch.zeros(rows)
    of_fp8 = ((bits.float(), scales, 1.0), (bits, scales[:1], 1.0), (bits, scales.half(), 1.0), (bits, scales, 0.0))
    for kind, *wrong in (*(("fp8", *each) for each in of_fp8), ("int8", bits.float(), None, 1.0), ("int8", bits, None, -1.0)):
        with pytest.raises(ValueError, match=r"expected \(…, D\) int8 and \(…\) fp32, contiguous"):
            names["run"](name, kind, inputs(name, "fp16"), *wrong)
