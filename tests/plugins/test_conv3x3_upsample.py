"""The kernel (interpreted on a CPU, or on a GPU), ONNX function body and cubins of conv3x3_upsample, against PyTorch in fp64."""

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret
from torch.nn import functional as F

from plugins import conv3x3, cubin
from plugins import conv3x3_upsample as op
from plugins.launch import Launch, evaluate
from sana_ref import conv_ops
from sana_ref.autoencoder import repeat_channels
from sana_ref.fused_decoder import of_corners

# (B, h, w, C, N, repeats): repeats of each kind, odd sides, three channels out, channels that no block divides, one pixel
SHAPES = [
    (2, 5, 7, 32, 16, 2),
    (1, 9, 15, 70, 70, 4),
    (1, 3, 5, 24, 48, 8),
    (3, 4, 1, 36, 9, 1),
    (1, 6, 3, 8, 6, 3),
    (2, 5, 7, 32, 3, 0),
    (1, 1, 1, 64, 16, 0),
]
GROUPS = (1, 33, 36, 16, 80, 0)  # more blocks of pixels than a group has, and two of columns
INTERPRETED = [
    *((shape, dtype) for shape in SHAPES for dtype in ("fp16", "fp32")),
    (GROUPS, "fp16"),
]  # not bf16, on a GPU only: Triton 3.9's interpreter multiplies its bits as if they were whole numbers


def inputs(shape, dtype, device="cpu"):
    batch, height, width, channels, outputs, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(batch, height, width, channels), (4 * outputs, 3, 3, channels), (4 * outputs,)]
    return [torch.randn(size, generator=generator).to(device, DTYPES[dtype]) for size in sizes]


def plain(x, weight, bias, repeats):
    """Operator by operator, as sana_ref.autoencoder.UpBlock, whose weights are in pixel_shuffle's order."""
    weight, bias = (t.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1) for t in (weight, bias))
    x = x.permute(0, 3, 1, 2)
    y = F.pixel_shuffle(F.conv2d(x, weight.permute(0, 3, 1, 2), bias, padding=1), 2)
    return (y + F.pixel_shuffle(repeat_channels(x, repeats), 2) if repeats else y).permute(0, 2, 3, 1)


def check(got, given, repeats, name):
    assert got.dtype == given[0].dtype
    assert got.is_contiguous()
    same, exact = plain(*given, repeats), plain(*(t.double() for t in given), repeats)
    assert got.shape == same.shape
    assert_parity(got.cpu(), same=same.cpu(), exact=exact.cpu(), name=name)


LAUNCH = """
from plugins import conv3x3_upsample as kernels
def launch(out, x, weight, bias, result, repeats, nearest=False):
    kernels.launch(x, weight, bias, result, repeats, nearest)
def swapped(out, x, weight, bias, result, repeats):  # rows and columns of the 2x2
    weight, bias = (t.unflatten(0, (2, 2, -1)).transpose(0, 1).reshape(t.shape) for t in (weight, bias))
    launch(out, x, weight, bias, result, repeats)
def unrepeated(out, x, weight, bias, result, repeats):
    launch(out, x, weight, bias, result, 0)
"""


# Of `nearest`: N of which blocks have a power of two that divides it, and one that has none of use
NEAREST = [(2, 5, 7, 32, 16, 2), (1, 4, 3, 48, 80, 0), (1, 3, 6, 40, 10, 1)]


def of_repeated_pixels(shape, dtype, device="cpu"):
    """x, weight (N, C, 3, 3) and bias of a convolution of x with each pixel four times."""
    x, weight, bias = inputs(shape, dtype, device)
    outputs = shape[4]
    return x, weight[:outputs].permute(0, 3, 1, 2).contiguous(), bias[:outputs]


def plain_nearest(x, weight, bias, repeats):
    """Operator by operator, as sana_ref.autoencoder.UpBlock."""
    x = x.permute(0, 3, 1, 2)
    y = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    return (y + F.pixel_shuffle(repeat_channels(x, repeats), 2) if repeats else y).permute(0, 2, 3, 1)


def by_corner(x, weight, bias):
    return x, of_corners(weight).permute(0, 2, 3, 1).contiguous(), bias.repeat(4)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Outputs by case, all from one process; last, two that are wrong."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "upsample_launch.py").write_text(LAUNCH)
    calls = []
    for shape, dtype in INTERPRETED:
        batch, height, width, _, outputs, repeats = shape
        out = torch.empty(batch, 2 * height, 2 * width, outputs, dtype=DTYPES[dtype])
        calls.append(((out, *inputs(shape, dtype)), {"repeats": repeats}))
    for shape in NEAREST:
        batch, height, width, _, outputs, repeats = shape
        out = torch.empty(batch, 2 * height, 2 * width, outputs)
        calls.append(((out, *by_corner(*of_repeated_pixels(shape, "fp32"))), {"repeats": repeats, "nearest": True}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("upsample_launch:launch", calls)
        wrong = {name: interpret(f"upsample_launch:{name}", calls[:1])[0] for name in ("swapped", "unrepeated")}
    return dict(zip([*INTERPRETED, *NEAREST], outputs, strict=True)) | wrong


@pytest.mark.parametrize("shape", NEAREST, ids=str)
def test_kernel_of_repeated_pixels(interpreted, shape):
    """Leaving five of nine taps out changes nothing, and it is the convolution of a picture whose pixels were repeated."""
    given = of_repeated_pixels(shape, "fp32")
    exact = [t.double() for t in given]
    truth = conv_ops.conv3x3_upsample(*by_corner(*exact), shape[-1], nearest=True)
    # By the terms of each sum: four taps have so few roundings that PyTorch's largest error is a matter of its order.
    terms = conv_ops.conv3x3_upsample(*(t.abs() for t in by_corner(*exact)), 0, nearest=True)
    count = 4 * shape[3] + 2  # products, the bias and what is added
    bound = count * 2.0**-24 * (terms + truth.abs())
    got = interpreted[shape].double()
    assert ((got - truth).abs() <= bound).all()
    rms = [(each.double() - truth).square().mean().sqrt() for each in (got, plain(*by_corner(*given), shape[-1]))]
    assert rms[0] <= 2 * rms[1]
    torch.testing.assert_close(truth, plain_nearest(*exact, shape[-1]), rtol=1e-9, atol=1e-9)


def test_corners_have_four_taps():
    weight = of_corners(torch.ones(1, 1, 3, 3))
    assert weight.shape == (4, 1, 3, 3)
    for corner, taps in enumerate(weight[:, 0]):
        i, j = divmod(corner, 2)
        assert taps[i : i + 2, j : j + 2].sum() == taps.sum() == 9


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernel(interpreted, case):
    shape, dtype = case
    check(interpreted[case], inputs(shape, dtype), shape[-1], f"kernel {case}")


@pytest.mark.parametrize("wrong", ["swapped", "unrepeated"])
def test_planted_errors_are_caught(interpreted, wrong):
    shape, dtype = INTERPRETED[0]
    with pytest.raises(AssertionError, match="expected at most"):
        check(interpreted[wrong], inputs(shape, dtype), shape[-1], wrong)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_truth(dtype, shape):
    given = inputs(shape, dtype)
    check(conv_ops.conv3x3_upsample(*given, shape[-1]), given, shape[-1], f"op {shape} {dtype}")


def test_op_is_registered_as_pytorch_asks():
    for repeats in (0, 2):
        torch.library.opcheck(torch.ops.sana.conv3x3_upsample.default, (*inputs((2, 3, 4, 8, 4, repeats), "fp32"), repeats))


def run_body(given, repeats):
    x, weight, bias = given
    attributes = {"repeats": repeats} if repeats else {}  # 0 is the body's default
    node = helper.make_node(op.OP, op.INPUTS, ["out"], domain=op.DOMAIN, launch="unused", **attributes)
    sizes = (["b", "h", "w", x.shape[-1]], list(weight.shape), list(bias.shape))
    inputs = {name: (t, each) for name, t, each in zip(op.INPUTS, given, sizes, strict=True)}
    return run_bodies([node], [op.function_body()], inputs, {"out": (x.dtype, ["b", "2*h", "2*w", len(bias) // 4])})


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_function_body(dtype):
    """In ONNX Runtime, with an attribute of the plugin's on the node."""
    for shape in SHAPES:
        given = inputs(shape, dtype)
        (got,) = run_body(given, shape[-1])
        check(got, given, shape[-1], f"body {shape} {dtype}")
        with pytest.raises(AssertionError, match="expected at most"):
            check(got * 1.02, given, shape[-1], "2 % too much")


@pytest.mark.parametrize(("outputs", "num_warps"), [(64, 4), (128, 8), (256, 8)])
def test_warps(outputs, num_warps):
    assert op.plan(90, "bf16", 2 * outputs, outputs, 2, True).num_warps == num_warps


@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
def test_cubins(target):
    """The launch that the plugin computes from the JSON covers every pixel and channel, and no program is in vain."""
    batch, height, width, channels, outputs, repeats = 3, 33, 18, 64, 200, 0
    attributes = op.compile_cubins([target], "bf16", channels, outputs, repeats)
    assert attributes["repeats"] == repeats
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    assert launch.inputs == ["bf16"] * 3
    dims = [(batch, height, width, channels)]
    assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [batch, 2 * height, 2 * width, outputs]
    chosen = op.plan(int(target.removeprefix("sm")), "bf16", channels, outputs, repeats, False)
    rows, columns = -(-height * width // chosen.block_m), -(-4 * outputs // chosen.block_n)
    assert [evaluate(size, dims) for size in launch.grid] == [rows * columns, batch, 1]
    assert [evaluate(arg[1], dims) for arg in launch.args if arg[0] == "i32"] == [height, width]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", cubin.CAPABILITIES)
def test_largest_blocks_fit(capability, dtype):
    for sizes in ((256, 128, 2, True), (512, 256, 2, True), (512, 256, 2, False)):  # the last two: of all columns that a block has
        assert op.compile_cubin(capability, dtype, *sizes).shared <= cubin.max_shared(capability)
    assert op.plan(capability, dtype, 512, 256, 2, True).block_n == conv3x3.BLOCK_N[dtype]


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        ("int8", (64, 64, 0), "got dtype 'int8'; expected one of fp16, bf16, fp32"),
        ("fp16", (0, 64, 0), "got 0 channels in, 256 out; expected some"),
        ("fp16", (64, 64, 2), "got 64 channels in, 64 out, 2 repeats; expected in x repeats = 4 x out, or 0"),
    ],
)
def test_bad_arguments(dtype, sizes, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(["sm89"], dtype, *sizes)


def test_wrong_tensors():
    x, weight, bias = inputs(SHAPES[0], "fp32")
    with pytest.raises(ValueError, match=r"conv3x3_upsample: got x, weight, bias of shapes .* expected \(B, h, w, C\)"):
        conv_ops.conv3x3_upsample(x, weight.permute(0, 3, 1, 2), bias)
    with pytest.raises(ValueError, match=r"got x, weight, bias of dtypes .* expected one floating dtype for all"):
        conv_ops.conv3x3_upsample(x, weight.half(), bias)
    with pytest.raises(ValueError, match="got a weight of 64 rows for 32 channels, 3 repeats; expected 4N rows, and 0 repeats or"):
        conv_ops.conv3x3_upsample(x, weight, bias, 3)
    with pytest.raises(ValueError, match="got a weight of 63 rows"):
        conv_ops.conv3x3_upsample(x, weight[1:], bias[1:])
    with pytest.raises(ValueError, match=r"Conv3x3Upsample: got x, weight, bias, y .*; expected x \(B, h, w, C\)"):
        op.launch(x, weight, bias, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, GROUPS, (2, 40, 33, 256, 128, 2), (1, 32, 32, 512, 512, 4), (1, 64, 64, 256, 3, 0)], ids=str
)
def test_op_on_gpu(shape, dtype):
    """In fp32 the op is its truth."""
    given = inputs(shape, dtype, "cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = conv_ops.conv3x3_upsample(*given, shape[-1])
        check(got, given, shape[-1], f"op {shape} {dtype}")
        assert torch.equal(conv_ops.conv3x3_upsample(*given, shape[-1]), got)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_picture_of_more_elements_than_32_bits_count():
    """Its last rows are those of a picture of the last rows alone."""
    x = torch.randn((1, 2050, 2048, 256), device="cuda", dtype=torch.bfloat16)  # y: (1, 4100, 4096, 128)
    weight, bias = (t.cuda().bfloat16() for t in inputs((1, 1, 1, 256, 128, 2), "bf16")[1:])
    got, last = (conv_ops.conv3x3_upsample(part, weight, bias, 2) for part in (x, x[:, -9:]))
    assert torch.equal(got[:, -16:], last[:, -16:])
