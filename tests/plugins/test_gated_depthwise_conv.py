"""The kernels of gated_depthwise_conv, interpreted on a CPU or on a GPU, and the op that runs them, against the truth in fp64."""

import json
from pathlib import Path

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import run_interpreted
from torch.nn import functional as F

from plugins import gated_depthwise_conv as op
from plugins import gated_depthwise_conv_backward as backward
from plugins.launch import Launch, evaluate
from sana_ref import gated_conv_ops as ops
from sana_ref.checkpoint import load
from sana_ref.layers import GLUMBConv

INTERPRETED = ("fp32", "fp16")  # bf16 apart: Triton 3.9's interpreter cuts off where a GPU rounds to nearest
# (B, H, W, E): odd sides, channels that no block divides, one pixel, and more than a program's rows and columns.
SHAPES = [(2, 5, 7, 70), (1, 1, 1, 64), (2, 6, 9, 5)]
NAMES = ("y", "dx", "dweight", "dbias")
# For the interpreter, which takes a second for a few programs: as SHAPES, the first with one picture; the last has two.
INTERPRETED_SHAPES = [(1, 4, 7, 70), *SHAPES[1:]]
ROWS = 3  # of a program, for the interpreter: sums are carried from row to row twice


def inputs(shape, dtype, device="cpu"):
    """dy, x, weight, bias."""
    *pixels, inner = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((*pixels, inner), (*pixels, 2 * inner), (2 * inner, 3, 3), (2 * inner,))
    dy, x, filters, bias = (torch.randn(size, generator=generator).to(device, DTYPES.get(dtype, dtype)) for size in sizes)
    return [dy, x, filters.permute(1, 2, 0).contiguous(), bias]


def plain(x, weight, bias):
    """Operator by operator, as sana_ref.layers.GLUMBConv."""
    filters = weight.permute(2, 0, 1)[:, None]
    a, g = F.conv2d(F.silu(x.permute(0, 3, 1, 2)), filters, bias, padding=1, groups=len(filters)).chunk(2, dim=1)
    return (a * F.silu(g)).permute(0, 2, 3, 1)


def both_ways(function, dy, *leaves):
    """NAMES of a differentiable function."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(got, given, name):
    same, exact = both_ways(plain, *given), both_ways(plain, *(t.double() for t in given))
    for part, one, peer, answer in zip(NAMES, got, same, exact, strict=True):
        assert one.dtype == peer.dtype
        assert_parity(one.cpu(), same=peer.cpu(), exact=answer.cpu(), name=f"{name}: {part}")


INTERPRET = f"""
import sys
import torch
import plugins.gated_depthwise_conv as kernel
import plugins.gated_depthwise_conv_backward as backward
from parity.interpreter import make_language_ready_once

make_language_ready_once()
kernel.ROWS, kernel.BLOCK_C = {ROWS}, 64
calls, results = torch.load(sys.argv[1]), []
for dy, x, weight, bias in calls:
    y, dx = torch.full_like(dy, torch.nan), torch.full_like(x, torch.nan)
    kernel.launch(x, weight, bias, y)
    results.append([y, dx, *backward.launch(dy, x, weight, bias, dx)])
torch.save(results, sys.argv[1])
"""


def interpret(cases, folder):
    """NAMES by shape and dtype, from one process."""
    path = folder / "calls"
    torch.save([inputs(*case) for case in cases], path)
    run_interpreted(INTERPRET, str(path))
    return dict(zip(cases, torch.load(path), strict=True))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    cases = [(shape, dtype) for shape in INTERPRETED_SHAPES for dtype in INTERPRETED]
    return interpret(cases, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.slow
def test_kernels_on_a_small_picture(tmp_path):
    case = (1, 2, 5, 6), "fp16"
    check(interpret([case], tmp_path)[case], inputs(*case), "kernels, small")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("shape", INTERPRETED_SHAPES, ids=str)
def test_kernels(interpreted, shape, dtype):
    check(interpreted[shape, dtype], inputs(shape, dtype), f"kernels {shape} {dtype}")


@pytest.mark.slow
def test_kernels_in_bf16(tmp_path):
    """To cut off costs up to a unit of the last place, and to round half of one: twice the usual bound."""
    case = (1, 2, 5, 6), "bf16"
    given = inputs(*case)
    same, exact = both_ways(plain, *given), both_ways(plain, *(t.double() for t in given))
    for part, one, peer, answer in zip(NAMES, interpret([case], tmp_path)[case], same, exact, strict=True):
        error, bound = ((t.double() - answer).square().mean().sqrt() for t in (one, peer))
        assert error <= 4 * bound, f"{part}: got {error:.1e}; expected at most four times {bound:.1e}"


@pytest.mark.slow
def test_planted_error_is_caught(interpreted):
    shape = INTERPRETED_SHAPES[0]
    y, *gradients = interpreted[shape, "fp16"]
    with pytest.raises(AssertionError, match="expected at most"):
        check([y.roll(1, dims=2), *gradients], inputs(shape, "fp16"), "moved by a column")
    gradients[1] = gradients[1].flip(1)
    with pytest.raises(AssertionError, match=r"dweight: .* expected at most"):
        check([y, *gradients], inputs(shape, "fp16"), "a filter turned round")


@pytest.mark.parametrize("dtype", DTYPES)
def test_truth(dtype):
    given = inputs(SHAPES[0], dtype)
    check(both_ways(ops.gated_depthwise_conv, *given), given, f"op {dtype}")


def test_op_is_registered_as_pytorch_asks():
    _, x, weight, bias = inputs((1, 3, 2, 4), torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sana.gated_depthwise_conv.default, leaves, test_utils=quick)
    assert torch.autograd.gradcheck(ops.gated_depthwise_conv, leaves)


def test_parameters_keep_their_dtype_beside_half_precision():
    dy, x, weight, bias = inputs(SHAPES[0], "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dweight, dbias = both_ways(ops.gated_depthwise_conv, dy.bfloat16(), x.bfloat16(), weight, bias)
    assert [t.dtype for t in (y, dx, dweight, dbias)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    wanted = both_ways(plain, dy.bfloat16().double(), x.bfloat16().double(), weight.double(), bias.double())
    torch.testing.assert_close([dweight.double(), dbias.double()], wanted[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_function_body(dtype):
    """In ONNX Runtime, with an attribute of the plugin's on the node."""
    for shape in SHAPES:
        _, *given = inputs(shape, dtype)
        channels, names = 2 * shape[-1], ("x", "weight", "bias")
        node = helper.make_node(op.OP, names, ["out"], domain=op.DOMAIN, channels=channels, launch="unused")
        sizes = (["b", "h", "w", channels], [3, 3, channels], [channels])
        fed = {name: (t, each) for name, t, each in zip(names, given, sizes, strict=True)}
        (got,) = run_bodies([node], [op.function_body()], fed, {"out": (given[0].dtype, ["b", "h", "w", channels // 2])})
        exact = plain(*(t.double() for t in given))
        assert_parity(got, same=plain(*given), exact=exact, name=f"function body {shape} {dtype}")
        with pytest.raises(AssertionError, match="expected at most"):
            assert_parity(got * 1.02, same=plain(*given), exact=exact, name="2 % too much")


@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
@pytest.mark.parametrize("out_scale", [None, 0.5])
def test_cubins(target, out_scale):
    """The launch that the plugin computes from the JSON covers every pixel and channel, and no program is in vain."""
    batch, height, width, inner = 3, 60, 18, 5600
    attributes = op.compile_cubins([target], "fp16", 2 * inner, out_scale, "int8")
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    dims = [(batch, height, width, 2 * inner), (3, 3, 2 * inner), (2 * inner,)]
    assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [batch, height, width, inner]
    channels, strips, pictures = (evaluate(size, dims) for size in launch.grid)
    assert (channels - 1) * op.BLOCK_C < inner <= channels * op.BLOCK_C
    rows = min(op.ROWS, max(op.least_rows(inner), height - 32))
    across, down = -(-width // op.COLUMNS), -(-height // rows)
    assert (strips, pictures) == (across * down, batch)
    arguments = json.loads(launch.to_json())["args"]
    assert arguments[:5] == [["in", 0], ["in", 1], ["in", 2], ["in", 0], ["out", 0]]
    assert [evaluate(number, dims) for kind, number in arguments[5:8] if kind == "i32"] == [height, width, rows]


@pytest.mark.parametrize(("inner", "rows"), [(5600, 11), (2880, 16), (64, 8)])
def test_programs_fill_waves(inner, rows):
    assert op.least_rows(inner) == rows


@pytest.mark.parametrize(
    ("targets", "dtype", "channels", "message"),
    [
        (["sm89"], "int8", 64, "got dtype 'int8'; expected one of fp16, bf16, fp32"),
        (["sm89"], "fp16", 63, "got 63 channels; expected an even number"),
        (["sm75"], "fp16", 64, "got target sm75; expected one of sm80"),
    ],
)
def test_bad_arguments(targets, dtype, channels, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(targets, dtype, channels)


@pytest.mark.parametrize(("x", "weight"), [((1, 2, 2, 7), (3, 3, 7)), ((1, 2, 2, 8), (5, 5, 8)), ((2, 2, 8), (3, 3, 8))], ids=str)
def test_wrong_shapes(x, weight):
    with pytest.raises(ValueError, match=r"got x, weight, bias of shapes .* expected \(B, H, W, 2E\)"):
        ops.gated_depthwise_conv(torch.ones(x), torch.ones(weight), torch.ones(weight[-1]))


@pytest.mark.parametrize("change", ["x", "weight", "bias", "fp64"])
def test_wrong_tensors(change):
    """The kernel would read past their ends."""
    dy, x, weight, bias = inputs((1, 2, 3, 4), torch.float64 if change == "fp64" else "fp16")
    given = {"x": x, "weight": weight, "bias": bias}
    if change != "fp64":
        given[change] = given[change][..., :-1].contiguous()
    with pytest.raises(ValueError, match=r"GatedDepthwiseConv: got .*; expected x \(B, H, W, 2E\)"):
        op.launch(*given.values(), torch.empty_like(dy))
    with pytest.raises(ValueError, match=r"GatedDepthwiseConv: got .*; expected x \(B, H, W, 2E\)"):
        backward.launch(dy, *given.values(), torch.empty_like(given["x"]))


def milliseconds(call, rounds=20):
    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / rounds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 33, 560)], ids=str)
def test_op_on_gpu(shape, dtype):
    given = inputs(shape, dtype, "cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = both_ways(ops.gated_depthwise_conv, *given)
        check(got, given, f"op {shape} {dtype}")
        again = both_ways(ops.gated_depthwise_conv, *given)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@torch.no_grad()
def activations():
    """x, weight and bias of each mix-FFN of sana-tiny, for noise."""
    transformer = load(Path(__file__).parents[2] / "models" / "sana-tiny").transformer(torch.float32, "cpu")
    layers, wide = [layer for layer in transformer.modules() if isinstance(layer, GLUMBConv)], []
    for layer in layers:
        layer.conv_inverted.register_forward_hook(lambda _, inputs, result: wide.append(result.permute(0, 2, 3, 1)))
    generator, config = torch.Generator().manual_seed(0), transformer.config
    latents = torch.randn(2, config.in_channels, 16, 16, generator=generator)
    text = torch.randn(2, 20, config.caption_channels, generator=generator)
    transformer(latents, text, torch.tensor([500.0, 900.0]), torch.ones(2, 20, dtype=torch.int64), None)
    filters = (layer.conv_depth.weight.flatten(1).T.unflatten(0, (3, 3)) for layer in layers)
    return [(x, weight, layer.conv_depth.bias) for x, weight, layer in zip(wide, filters, layers, strict=True)]


@pytest.mark.slow
def test_activations_are_negative_far_from_zero():
    """Where SiLU's result is nothing beside what tanh's approximation loses."""
    assert all((x < -4).double().mean() > 0.001 and weight.shape == (3, 3, x.shape[-1]) for x, weight, _ in activations())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_on_activations_of_sana_tiny(dtype):
    for number, layer in enumerate(activations()):
        given = [t.to("cuda", DTYPES[dtype]).contiguous() for t in layer]
        same, exact = plain(*given), plain(*(t.double() for t in given))
        got = ops.gated_depthwise_conv(*given)
        assert_parity(got.cpu(), same=same.cpu(), exact=exact.cpu(), name=f"block {number}, {dtype}")
        ratio = (got - exact).square().mean().sqrt() / (same - exact).square().mean().sqrt()
        print(f"block {number}, {dtype}: {ratio:.2f} x PyTorch's rms error")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_op_is_faster_than_the_operators():
    """At the size of a training step: 16 pictures of 32 x 32 tokens of Sana 1.6B."""
    dy, x, weight, bias = inputs((16, 32, 32, 5600), "bf16", "cuda")
    with torch.backends.cudnn.flags(benchmark=True):
        times = {
            name: milliseconds(lambda function=function: both_ways(function, dy, x, weight, bias))
            for name, function in (("op", ops.gated_depthwise_conv), ("plain", plain), ("compiled", torch.compile(plain)))
        }
    print({name: f"{time:.2f} ms" for name, time in times.items()})
    assert times["op"] < min(times["plain"], times["compiled"])
