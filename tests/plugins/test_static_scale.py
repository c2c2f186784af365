"""Kernels that quantise with a given scale: bits and scales of each (interpreted on a CPU, or on a GPU), and their cubins."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity.eight_bits import assert_e4m3
from parity.interpreter import interpret

from plugins import cross_attention, gated_depthwise_conv, qkv_linear_attention
from plugins.launch import Launch, evaluate
from sana_ref import attention_ops, ops

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
BLOCK, HEADS = 1, 2
# By op: the shape of its inputs and of its output. Odd sizes: masks of tokens, columns, channels and heads take part.
SHAPES = {
    "cross": ([(2, 70, 2 * 20), (2, 2, 1, HEADS, 33, 20), (2, 2, 1, HEADS, 33, 20), (2, 33)], (2, 70, 2 * 20)),
    "cross in parts": ([(2, 130, 2 * 39), (2, 2, 1, HEADS, 33, 39), (2, 2, 1, HEADS, 33, 39), (2, 33)], (2, 130, 2 * 39)),
    "linear": ([(2, 70, 3 * HEADS * 32)], (2, 70, HEADS * 32)),
    "conv": ([(2, 3, 5, 2 * 70), (2 * 70, 1, 3, 3), (2 * 70,)], (2, 3, 5, 70)),
}


def truth(name, tensors):
    if name.startswith("cross"):
        return attention_ops.cross_attention_truth(*tensors, BLOCK)
    if name == "linear":
        return ops.qkv_linear_attention_truth(tensors[0], HEADS)
    x, weight, bias = tensors
    a, g = F.conv2d(F.silu(x.permute(0, 3, 1, 2)), weight, bias, padding=1, groups=len(weight)).chunk(2, dim=1)
    return (a * F.silu(g)).permute(0, 2, 3, 1)


def inputs(name, dtype):
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in SHAPES[name][0]]


def scale_of(name, dtype):
    """Half of what would do: the largest numbers are cut off."""
    exact = truth(name, [t.double() for t in inputs(name, dtype)])
    return (exact.abs().max() / 448 / 2).float().item()


def check(bits, scales, name, dtype, label):
    given, scale = inputs(name, dtype), scale_of(name, dtype)
    same, exact = truth(name, given).double(), truth(name, [t.double() for t in given])
    assert (scales == torch.tensor(scale)).all(), f"{label}: got scales {scales.unique()}; expected {scale} everywhere"
    # The project's bound: twice PyTorch's own error at this precision; and the two roundings of a number times a reciprocal.
    tolerance = 2 * (same - exact).abs().max() / scale + (exact / scale).abs() * 2.0**-21
    assert_e4m3(bits, exact / scale, tolerance, label)
    assert (bits.view(torch.float8_e4m3fn).float().abs() == 448).any()


LAUNCH = f"""
import torch
from plugins import cross_attention, gated_depthwise_conv, qkv_linear_attention
def run(name, tensors, bits, scales, scale):
    quantized = scales, scale
    if name.startswith("cross"):
        cross_attention.launch(*tensors, bits, {BLOCK}, quantized)
    elif name == "linear":
        qkv_linear_attention.launch(*tensors, bits, {HEADS}, quantized=quantized)
    else:
        gated_depthwise_conv.launch(*tensors, bits, quantized)
def launch(out, *tensors, name, scale):
    gated_depthwise_conv.BLOCK_C = 64  # several programs for the channels
    *tensors, result = tensors
    bits, scales = torch.full(out[..., 1:].shape, -1, dtype=torch.int8), torch.full(out.shape[:-1], float("nan"))  # -1: NaN's bits
    run(name, tensors, bits, scales, scale)
    result[..., :-1], result[..., -1] = bits, scales
"""


def poisoned(name):
    """fp32 inputs with one NaN."""
    tensors = inputs(name, "fp32")
    tensors[0].view(-1)[0] = torch.nan
    return tensors


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(bits, scales) by op and dtype; and, by op and "nan", of `poisoned`."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "static_launch.py").write_text(LAUNCH)
    named = {(name, dtype): inputs(name, dtype) for name in SHAPES for dtype in DTYPES}
    named |= {(name, "nan"): poisoned(name) for name in SHAPES}
    calls = []
    for (name, dtype), tensors in named.items():
        *rows, dim = SHAPES[name][1]
        scale = scale_of(name, "fp32" if dtype == "nan" else dtype)
        calls.append(((torch.empty(*rows, dim + 1), *tensors), {"name": name, "scale": scale}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("static_launch:launch", calls)
    return {key: (out[..., :-1].to(torch.int8), out[..., -1]) for key, out in zip(named, outputs, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel(interpreted, name, dtype):
    check(*interpreted[name, dtype], name, dtype, f"kernel {name} {dtype}")


@pytest.mark.parametrize("name", SHAPES)
def test_a_nan_stays_one(interpreted, name):
    bits, scales = interpreted[name, "nan"]
    got, exact = bits.view(torch.float8_e4m3fn).float(), truth(name, poisoned(name))
    assert exact.isnan().any()
    assert torch.equal(got.isnan(), exact.isnan())
    assert scales.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_planted_errors_are_caught(interpreted, name):
    bits, scales = interpreted[name, "fp32"]
    with pytest.raises(AssertionError, match="values are wrong"):
        check(bits.roll(1, -1), scales, name, "fp32", "another place")
    with pytest.raises(AssertionError, match="everywhere"):
        check(bits, scales.index_fill(1, torch.tensor([0]), 1.0), name, "fp32", "one scale")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_on_gpu(name, dtype):
    """Where the conversion to e4m3, and what it does with numbers beyond 448, is the hardware's."""
    *rows, _ = shape = SHAPES[name][1]
    bits = torch.full(shape, -1, dtype=torch.int8, device="cuda")
    scales = torch.full(rows, torch.nan, device="cuda")
    names: dict[str, object] = {}
    exec(LAUNCH, names)
    names["run"](name, [t.cuda() for t in inputs(name, dtype)], bits, scales, scale_of(name, dtype))
    check(bits.cpu(), scales.cpu(), name, dtype, f"kernel {name} {dtype}")


def attributes(name, targets, out_scale):
    if name.startswith("cross"):
        heads, head_dim = (20, 112) if name == "cross" else (16, 72)
        sizes = {"heads": heads, "n_keys": 300, "head_dim": head_dim, "block": 7}
        return cross_attention.compile_cubins(targets, "fp16", **sizes, out_scale=out_scale)
    if name == "linear":
        return qkv_linear_attention.compile_cubins(qkv_linear_attention.APPLY, targets, "fp16", 70, 32, out_scale=out_scale)
    return gated_depthwise_conv.compile_cubins(targets, "fp16", 2 * 5600, out_scale)


DIMS = {
    "cross": ([(6, 65, 2240), *[(20, 2, 3, 20, 300, 112)] * 2, (6, 300)], [6, 65, 2240]),
    "cross in parts": ([(6, 130, 1152), *[(28, 2, 3, 16, 300, 72)] * 2, (6, 300)], [6, 130, 1152]),
    "linear": ([(2, 70, 3 * 2240), (2, 70, 1, 33, 32)], [2, 70, 2240]),
    "conv": ([(3, 33, 18, 2 * 5600), (2 * 5600, 1, 3, 3), (2 * 5600,)], [3, 33, 18, 5600]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_cubins(name):
    """Pointers and numbers in the kernel's order: scales behind bits, the scale behind the other numbers."""
    made, plain = attributes(name, ["sm90"], 0.25), attributes(name, ["sm90"], None)
    launch, old = (Launch.from_json(each["launch"]) for each in (made, plain))
    assert launch.cubin(made["cubins"], "sm90")[:4] == b"\x7fELF"
    dims, shape = DIMS[name]
    assert [output.type for output in launch.outputs] == ["int8", "fp32"]
    assert [[evaluate(size, dims) for size in output.shape] for output in launch.outputs] == [shape, shape[:-1]]
    assert (launch.inputs, launch.grid) == (old.inputs, old.grid)
    args, before = (json.loads(each.to_json())["args"] for each in (launch, old))
    wanted = [arg for arg in before if arg != ["null"]]
    wanted.insert(wanted.index(["out", 0]) + 1, ["out", 1])
    assert [arg for arg in args if arg != ["null"]] == [*wanted, ["f32", 0.25]]


@pytest.mark.parametrize("name", SHAPES)
def test_old_targets(name):
    with pytest.raises(ValueError, match="got target sm86; expected sm89 or newer"):
        attributes(name, ["sm86"], 0.25)


@pytest.mark.parametrize("name", SHAPES)
def test_bad_outputs(name):
    names: dict[str, object] = {}
    exec(LAUNCH, names)
    *rows, _ = shape = SHAPES[name][1]
    bits, scales = torch.zeros(shape, dtype=torch.int8), torch.zeros(rows)
    for wrong in ((bits.float(), scales, 1.0), (bits, scales[:1], 1.0), (bits, scales.half(), 1.0), (bits, scales, 0.0)):
        with pytest.raises(ValueError, match=r"expected \(…, D\) int8 and \(…\) fp32, contiguous"):
            names["run"](name, inputs(name, "fp16"), *wrong)
