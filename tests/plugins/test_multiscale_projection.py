"""The kernel (interpreted, or on a GPU), ONNX function body and cubins of multiscale_projection, against PyTorch in fp64."""

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret
from torch.nn import functional as F

from plugins import cubin
from plugins import multiscale_projection as op
from plugins.launch import Launch, evaluate
from sana_ref import conv_ops, fused_decoder

# (B, h, w, C, D): sides that no strip divides, more rows than one walk of a program, two programs of channels, one pixel
SHAPES = [(1, 3, 5, 192, 64), (2, 5, 7, 32, 16), (1, 33, 3, 32, 32), (1, 1, 1, 160, 32)]
INTERPRETED = [
    *((shape, "fp16") for shape in SHAPES),
    (SHAPES[0], "fp32"),
    (SHAPES[3], "fp32"),
]  # bf16: see test_conv3x3_upsample.py


def inputs(shape, dtype, device="cpu"):
    batch, height, width, channels, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(batch, height, width, channels), (25, channels), (channels, head_dim)]
    scales = (1.0, 0.2, head_dim**-0.5)  # what comes out is about as large as what goes in
    return [
        (torch.randn(size, generator=generator) * scale).to(device, DTYPES[dtype])
        for size, scale in zip(sizes, scales, strict=True)
    ]


def plain(x, near, mix):
    """Operator by operator, as sana_ref.autoencoder.MultiscaleLinearAttention."""
    channels, first = x.shape[3], x.permute(0, 3, 1, 2)
    y = F.conv2d(first, near.t().reshape(channels, 1, 5, 5), padding=2, groups=channels)
    y = F.conv2d(y, mix[..., None, None], groups=channels // mix.shape[1])
    return torch.cat([first, y], dim=1).permute(0, 2, 3, 1)


def check(got, given, name):
    assert got.dtype == given[0].dtype
    assert got.is_contiguous()
    channels = given[0].shape[3]
    assert torch.equal(got[..., :channels], given[0])
    same, exact = plain(*given), plain(*(t.double() for t in given))
    assert got.shape == same.shape
    assert_parity(
        *(t[..., channels:].cpu() for t in (got,)), same=same[..., channels:].cpu(), exact=exact[..., channels:].cpu(), name=name
    )


LAUNCH = """
from plugins import multiscale_projection as kernels
def launch(out, x, near, mix, result):
    kernels.launch(x, near, mix, result)
def turned(out, x, near, mix, result):  # rows and columns of the taps
    launch(out, x, near.unflatten(0, (5, 5)).transpose(0, 1).reshape(near.shape), mix, result)
def mixed(out, x, near, mix, result):  # channels in and out of a head
    size = mix.shape[1]
    launch(out, x, near, mix.unflatten(0, (-1, size)).mT.reshape(mix.shape), result)
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Outputs by case, all from one process; last, two that are wrong."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "multiscale_launch.py").write_text(LAUNCH)
    calls = []
    for shape, dtype in INTERPRETED:
        out = torch.empty(*shape[:3], 2 * shape[3], dtype=DTYPES[dtype])
        calls.append(((out, *inputs(shape, dtype)), {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("multiscale_launch:launch", calls)
        wrong = {name: interpret(f"multiscale_launch:{name}", calls[:1])[0] for name in ("turned", "mixed")}
    return dict(zip(INTERPRETED, outputs, strict=True)) | wrong


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernel(interpreted, case):
    check(interpreted[case], inputs(*case), f"kernel {case}")


@pytest.mark.parametrize("wrong", ["turned", "mixed"])
def test_planted_errors_are_caught(interpreted, wrong):
    with pytest.raises(AssertionError, match="expected at most"):
        check(interpreted[wrong], inputs(*INTERPRETED[0]), wrong)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_truth(dtype, shape):
    given = inputs(shape, dtype)
    check(conv_ops.multiscale_projection(*given), given, f"op {shape} {dtype}")


def test_op_is_registered_as_pytorch_asks():
    torch.library.opcheck(torch.ops.sana.multiscale_projection.default, tuple(inputs((2, 3, 4, 32, 16), "fp32")))


def run_body(given, channels, head_dim):
    attributes, sides = op.body_attributes(channels, head_dim), ["b", "h", "w"]
    node = helper.make_node(op.OP, op.INPUTS, ["out"], domain=op.DOMAIN, launch="unused", **attributes)
    sizes = ([*sides, channels], [25, channels], [channels, head_dim])
    inputs = {name: (t, each) for name, t, each in zip(op.INPUTS, given, sizes, strict=True)}
    return run_bodies([node], [op.function_body()], inputs, {"out": (given[0].dtype, [*sides, 2 * channels])})


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_function_body(dtype):
    """In ONNX Runtime, with an attribute of the plugin's on the node."""
    for shape in SHAPES:
        given = inputs(shape, dtype)
        (got,) = run_body(given, *shape[3:])
        check(got, given, f"body {shape} {dtype}")


@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
def test_cubins(target):
    """The launch that the plugin computes from the JSON covers every pixel and channel, and no program is in vain."""
    batch, height, width, channels = 3, 100, 18, 192
    attributes = op.compile_cubins([target], "bf16", channels, 32)
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    assert launch.inputs == ["bf16"] * 3
    dims = [(batch, height, width, channels)]
    assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [batch, height, width, 2 * channels]
    assert [evaluate(size, dims) for size in launch.grid] == [2, 5 * 5, batch]  # strips of 24 rows, a quarter in whole fours
    assert [evaluate(arg[1], dims) for arg in launch.args if arg[0] == "i32"] == [height, width, channels, 24]
    for tall, rows in ((8, 16), (70, 16), (200, 32)):
        *_, found = (evaluate(arg[1], [(batch, tall, width, channels)]) for arg in launch.args if arg[0] == "i32")
        assert found == op.strip_rows(tall) == rows


@pytest.mark.slow
@pytest.mark.parametrize("capability", cubin.CAPABILITIES)
def test_the_widest_head_fits(capability):
    assert op.compile_cubin(capability, "bf16", max(op.HEAD_DIMS)).shared <= cubin.max_shared(capability)


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        ("int8", (64, 32), "got dtype 'int8'; expected one of fp16, bf16, fp32"),
        ("fp16", (72, 24), r"got 72 channels, 24 a head; expected a head of \(16, 32, 64\), and a multiple of it"),
        ("fp16", (72, 16), "got 72 channels, 16 a head"),
    ],
)
def test_bad_arguments(dtype, sizes, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(["sm89"], dtype, *sizes)


def test_wrong_tensors():
    x, near, mix = inputs(SHAPES[0], "fp32")
    with pytest.raises(
        ValueError, match=r"multiscale_projection: got x, near, mix of shapes .* expected \(B, h, w, C\), \(25, C\)"
    ):
        conv_ops.multiscale_projection(x, near.t(), mix)
    with pytest.raises(ValueError, match=r"got x, near, mix of dtypes .* expected one floating dtype for all"):
        conv_ops.multiscale_projection(x, near.half(), mix)
    with pytest.raises(ValueError, match=r"MultiscaleProjection: got x, near, mix, out .*; expected x \(B, h, w, C\)"):
        op.launch(x, near, mix, x)


def test_the_fused_decoder_knows_which_heads_there_are():
    assert (fused_decoder.HEAD_DIMS, fused_decoder.KERNEL_SIZE) == (op.HEAD_DIMS, op.KERNEL_SIZE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 33, 40, 1536, 32), (1, 128, 128, 1536, 32)], ids=str)
def test_op_on_gpu(shape, dtype):
    """In fp32 the op is its truth."""
    given = inputs(shape, dtype, "cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = conv_ops.multiscale_projection(*given)
        check(got, given, f"op {shape} {dtype}")
        assert torch.equal(conv_ops.multiscale_projection(*given), got)
