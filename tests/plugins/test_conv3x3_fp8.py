"""The kernels (interpreted on a CPU, or on a GPU) and cubins of conv3x3_fp8 and fp8_static_quantize, against PyTorch in fp64."""

import json

import pytest
import torch
from parity.bound import assert_parity
from parity.e4m3 import assert_e4m3
from parity.interpreter import interpret
from torch.nn import functional as F

from plugins import conv3x3, cubin
from plugins import conv3x3_fp8 as op
from plugins import fp8_static_quantize as quantize
from plugins.launch import Launch, evaluate
from sana_ref import conv_ops
from sana_ref.quantize_ops import quantize_weight

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# (B, h, w, C, N): few channels out, sides and channels that no block divides, one pixel, several blocks of both
SHAPES = [(2, 5, 7, 32, 3), (1, 9, 15, 80, 130), (1, 1, 1, 64, 16), (1, 33, 36, 16, 130)]
KINDS = ("none", "relu", "silu", op.NORM)
CASES = [(SHAPES[1], "silu", False), (SHAPES[1], op.NORM, True), (SHAPES[0], op.NORM, False), (SHAPES[0], "silu", True)]
CASES += [(SHAPES[0], "none", False), (SHAPES[0], "relu", True), (SHAPES[2], op.NORM, True), (SHAPES[3], "none", True)]


def inputs(shape, kind, dtype="fp16", device="cpu"):
    """In the order of op.INPUTS. Scales differ from channel to channel, and bits use e4m3's range."""
    batch, height, width, channels, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(size, generator=generator)

    x = (random(batch, height, width, channels) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight = quantize_weight(random(outputs, 9 * channels), "fp8", "weight")
    tensors = [
        x.view(torch.int8),
        weight.numbers.view(torch.int8).unflatten(1, (3, 3, -1)),
        weight.scale / 100 / (9 * channels) ** 0.5,
    ]
    others = [random(batch, height, width, outputs), random(outputs), random(outputs)] if kind == op.NORM else [random(outputs)]
    return [t.to(device) for t in (*tensors, *(t.to(DTYPES[dtype]) for t in others))]


def convolved(x, weight, scales):
    """At the scales' precision."""
    real = [t.view(torch.float8_e4m3fn).to(scales.dtype).permute(0, 3, 1, 2) for t in (x, weight)]
    return F.conv2d(*real, padding=1).permute(0, 2, 3, 1) * scales


def ended(kind, conv, *others):
    """At conv's precision."""
    others = [t.to(conv.dtype) for t in others]
    if kind != op.NORM:
        return conv_ops.ACTIVATIONS[kind](conv + others[0])
    residual, norm_weight, norm_bias = others
    return residual + conv * torch.rsqrt(conv.square().mean(-1, keepdim=True) + op.EPS) * norm_weight + norm_bias


def exactly(kind, x, weight, scales, *others):
    return ended(kind, convolved(x, weight, scales.double()), *others)


def out_scale_of(given, kind):
    """Half of what would do: the largest numbers are cut off."""
    return (exactly(kind, *(t.cpu() for t in given)).abs().max() / 448 / 2).float().item()


def check(y, bits, given, kind, out_scale, name, peer=None):
    """peer: PyTorch's result of the sum, fp32; else PyTorch sums in fp32 as well."""
    x, weight, scales, *others = given = [t.cpu() for t in given]
    exact = exactly(kind, *given)
    same = ended(kind, convolved(x, weight, scales) if peer is None else peer.cpu(), *others)
    if y is not None:
        assert y.dtype == others[-1].dtype
        assert_parity(y.cpu(), same=same.to(y.dtype), exact=exact, name=f"{name} {kind}")
    if bits is not None:
        # Twice PyTorch's own error, and the roundings of a number times a reciprocal.
        tolerance = 2 * (same.double() - exact).abs().max() / out_scale + (exact / out_scale).abs() * 2.0**-21
        assert_e4m3(bits.cpu(), exact / out_scale, tolerance, f"{name} {kind} bits")
        assert (bits.cpu().view(torch.float8_e4m3fn).float().abs() == 448).any()


LAUNCH = """
import torch
from plugins import conv3x3_fp8 as kernels, fp8_static_quantize
def run(kind, out_scale, *given):
    '''y and bits, one of them None where there is one.'''
    shape, half = (*given[0].shape[:3], given[1].shape[0]), given[-1]
    y = half.new_full(shape, float("nan"))
    bits = None if out_scale is None else torch.full(shape, -1, dtype=torch.int8, device=half.device)  # -1: NaN's
    if kind == kernels.NORM:
        kernels.launch_norm(*given, y, bits, out_scale)
        return y, bits
    kernels.launch(*given, y if bits is None else bits, kind, out_scale)
    return (y, None) if bits is None else (None, bits)
def launch(out, *given, kind, out_scale):
    *given, result = given
    for place, found in enumerate(run(kind, out_scale, *given)):
        if found is not None:
            result[place] = found
def turned(out, x, weight, *rest, kind, out_scale):
    launch(out, x, weight.flip(2), *rest, kind=kind, out_scale=out_scale)
def quantized(out, x, result, scale):
    bits = torch.full(x.shape, -1, dtype=torch.int8)
    fp8_static_quantize.launch(x, bits, scale)
    result[:] = bits
"""


def to_quantize():
    """More numbers than a program has; the largest is cut off, one is NaN."""
    x = torch.randn(3, 5, 7, 40, generator=torch.Generator().manual_seed(1)).half()
    x[1, 2, 3, 4] = torch.nan
    return x


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(y, bits) by case; by "wrong", those of filters turned round; by "quantized", bits of `to_quantize` with the scale 1/256."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "fp8_conv_launch.py").write_text(LAUNCH)
    calls = []
    for shape, kind, quantized in CASES:
        given = inputs(shape, kind)
        out = torch.empty(2, *shape[:3], shape[4])
        calls.append(((out, *given), {"kind": kind, "out_scale": out_scale_of(given, kind) if quantized else None}))
    x = to_quantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("fp8_conv_launch:launch", calls)
        wrong = interpret("fp8_conv_launch:turned", calls[:1])[0]
        bits = interpret("fp8_conv_launch:quantized", [((x.float(), x), {"scale": 1 / 256})])[0]
    found = {case: (out[0].half(), out[1].nan_to_num().to(torch.int8)) for case, out in zip(CASES, outputs, strict=True)}
    return found | {"wrong": (wrong[0].half(), None), "quantized": bits.to(torch.int8)}


def seen(case, y, bits, name):
    shape, kind, quantized = case
    given = inputs(shape, kind)
    check(
        y if kind == op.NORM or not quantized else None,
        bits if quantized else None,
        given,
        kind,
        out_scale_of(given, kind),
        f"{name} {shape}",
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(interpreted, case):
    seen(case, *interpreted[case], "kernel")


def test_planted_errors_are_caught(interpreted):
    with pytest.raises(AssertionError, match="expected at most"):
        seen(CASES[0], *interpreted["wrong"], "filters turned round")
    y, bits = interpreted[CASES[1]]
    with pytest.raises(AssertionError, match="values are wrong"):
        seen(CASES[1], y, bits.roll(1, -1), "another place")


def test_static_quantize(interpreted):
    exact = to_quantize().double() * 256
    assert_e4m3(interpreted["quantized"], exact, exact.abs() * 2.0**-21, "static quantize")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 33, 128, 128), (1, 64, 64, 256, 256), (3, 17, 16, 512, 208)], ids=str)
def test_kernels_on_gpu(shape, kind, dtype):
    """Beside PyTorch's own product of FP8, whose sums the tensor core makes as well."""
    given = inputs(shape, kind, dtype, "cuda")
    x, weight, scales, *_ = given
    names: dict[str, object] = {}
    exec(LAUNCH, names)
    batch, height, width, channels, outputs = shape
    # im2col of the bits as numbers that fp16 has; sides padded to what the product takes
    real = x.view(torch.float8_e4m3fn).half().permute(0, 3, 1, 2)
    rows = F.unfold(real, 3, padding=1).unflatten(1, (channels, 9)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    pad, more = -outputs % 16, -rows.shape[1] % 16
    left = F.pad(rows, (0, more)).to(torch.float8_e4m3fn)
    right = F.pad(weight.view(torch.float8_e4m3fn).half().flatten(1), (0, more, 0, pad)).to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    product = torch._scaled_mm(left, right.T, one, one, out_dtype=torch.float32, use_fast_accum=True)
    peer = product[:, :outputs].unflatten(0, (batch, height, width)) * scales
    for out_scale in (None, out_scale_of(given, kind)):
        y, bits = names["run"](kind, out_scale, *given)
        check(y, bits, given, kind, out_scale, f"kernel {shape} {dtype}", peer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_static_quantize_on_gpu():
    x = to_quantize()
    bits = torch.full(x.shape, -1, dtype=torch.int8, device="cuda")
    quantize.launch(x.cuda(), bits, 1 / 256)
    exact = x.double() * 256
    assert_e4m3(bits.cpu(), exact, exact.abs() * 2.0**-21, "static quantize")


@pytest.mark.parametrize("name", [op.OP, op.NORM])
@pytest.mark.parametrize("out_scale", [None, 0.25])
@pytest.mark.parametrize("target", ["sm90", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm89", "sm100", "sm120"))])
def test_cubins(target, out_scale, name):
    """The launch covers every pixel and channel; outputs and numbers are in the kernel's order."""
    batch, height, width, channels, outputs = 3, 33, 18, 32, 200
    made = op.compile_cubins(name, [target], "bf16", channels, outputs, eps=1e-3, out_scale=out_scale)
    launch = Launch.from_json(made["launch"])
    assert launch.cubin(made["cubins"], target)[:4] == b"\x7fELF"
    assert launch.inputs[:3] == ["int8", "int8", "fp32"]
    assert set(launch.inputs[3:]) == {"bf16"}
    kinds = {op.OP: (["bf16"], ["int8"]), op.NORM: (["bf16"], ["bf16", "int8"])}[name]
    assert [output.type for output in launch.outputs] == kinds[out_scale is not None]
    dims = [(batch, height, width, channels)]
    assert all([evaluate(size, dims) for size in output.shape] == [batch, height, width, outputs] for output in launch.outputs)
    chosen = op.plan(name, int(target.removeprefix("sm")), channels, outputs)
    columns = 1 if name == op.NORM else -(-outputs // chosen.block_n)
    assert [evaluate(size, dims) for size in launch.grid] == [-(-height * width // chosen.block_m) * columns, batch, 1]
    numbers = [arg for arg in json.loads(launch.to_json())["args"] if arg[0] in ("i32", "f32")]
    assert [evaluate(arg[1], dims) for arg in numbers[:2]] == [height, width]
    assert [arg[1] for arg in numbers[2:]] == [*([1e-3] if name == op.NORM else []), *([out_scale] if out_scale else [])]


def test_cubins_of_static_quantize():
    made = quantize.compile_cubins(["sm90"], "bf16", 130, 4, 0.25)
    launch = Launch.from_json(made["launch"])
    dims = [(2, 9, 15, 130)]
    assert [evaluate(size, dims) for size in launch.outputs[0].shape] == list(dims[0])
    assert evaluate(launch.grid[0], dims) == -(-2 * 9 * 15 * 130 // quantize.BLOCK)
    assert [arg for arg in json.loads(launch.to_json())["args"] if arg[0] == "f32"] == [["f32", 0.25]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [op.OP, op.NORM])
@pytest.mark.parametrize("capability", [sm for sm in cubin.CAPABILITIES if sm >= 89])
def test_largest_blocks_fit(capability, name):
    made = op.compile_cubin(name, capability, "bf16", conv3x3.MAX_NORM, conv3x3.MAX_NORM, quantized=True)
    assert made.shared <= cubin.max_shared(capability)


@pytest.mark.parametrize(
    ("name", "target", "dtype", "sizes", "activation", "message"),
    [
        (op.OP, "sm86", "bf16", (64, 64), "none", "got target sm86; expected sm89 or newer"),
        (op.OP, "sm90", "fp32", (64, 64), "none", "got dtype 'fp32'; expected one of fp16, bf16"),
        (op.OP, "sm90", "bf16", (0, 64), "none", "got 0 channels in, 64 out; expected some"),
        (op.OP, "sm90", "bf16", (64, 64), "gelu", "got activation 'gelu'; expected one of none, relu, silu"),
        (op.NORM, "sm90", "bf16", (64, 257), "none", "got 257 channels out; expected at most 256"),
    ],
)
def test_bad_arguments(name, target, dtype, sizes, activation, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(name, [target], dtype, *sizes, activation=activation)


def test_wrong_tensors():
    x, weight, scales, bias = inputs(SHAPES[0], "none")
    y = torch.zeros(2, 5, 7, 3, dtype=torch.float16)
    for wrong in ((x.half(), weight, scales, bias, y), (x, weight, scales.half(), bias, y), (x, weight, scales, bias, y.float())):
        with pytest.raises(ValueError, match=r"Fp8Conv3x3: got x, weight, scales, bias, y and bits .* expected x \(B, h, w, C\)"):
            op.launch(*wrong)
    with pytest.raises(ValueError, match="got bits alone; expected both or neither"):
        op.launch_norm(*inputs(SHAPES[0], op.NORM), y, y.to(torch.int8))
    with pytest.raises(ValueError, match="expected x fp16 or bf16, bits int8"):
        quantize.launch(y, y, 1.0)
