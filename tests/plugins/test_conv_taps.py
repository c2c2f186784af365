"""The kernels (interpreted on a CPU, or on a GPU), ONNX function bodies and cubins of conv_taps, against PyTorch in fp64."""

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret
from torch.nn import functional as F

from plugins import conv_taps as op
from plugins.launch import Launch, evaluate
from sana_ref import fused_decoder, tap_ops
from sana_ref.layers import RMSNorm

# (B, h, w, C, N): a block's channels, fewer, more; pixels that no block divides, and more than one block of them; one pixel
SHAPES = [(2, 5, 7, 32, 3), (1, 13, 45, 70, 1), (1, 1, 1, 128, 2), (1, 3, 2, 256, 3)]
SUMMED = [*SHAPES, (1, 20, 33, 16, 3)]  # more than one block of the second kernel
HALVES = [name for name in DTYPES if name in op.TYPES]


def inputs(shape, dtype, device="cpu"):
    """x, norm_weight, norm_bias, a Conv2d's weight, and its bias."""
    batch, height, width, channels, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(batch, height, width, channels), (channels,), (channels,), (outputs, channels, 3, 3), (outputs,)]
    return [torch.randn(size, generator=generator).to(device, DTYPES.get(dtype, dtype)) for size in sizes]


def flat(weight):
    return weight.permute(1, 0, 2, 3).flatten(1).contiguous()


def normed(x, norm_weight, norm_bias):
    """Operator by operator, as sana_ref.autoencoder.Decoder, whose channels come first."""
    norm = RMSNorm(x.shape[-1], bias=True, axis=1).to(x)
    norm.weight.data, norm.bias.data = norm_weight, norm_bias
    return F.relu(norm(x.permute(0, 3, 1, 2))).detach()


def plain(x, norm_weight, norm_bias, weight, bias):
    return F.conv2d(normed(x, norm_weight, norm_bias), weight, bias, padding=1).permute(0, 2, 3, 1)


def plain_taps(x, norm_weight, norm_bias, weight, bias):
    return torch.einsum("bchw,cn->bnhw", normed(x, norm_weight, norm_bias), flat(weight))


def plain_sum(taps, bias):
    """By padding and slices."""
    height, width = taps.shape[2:]
    padded = F.pad(taps, (1, 1, 1, 1)).unflatten(1, (-1, 9))
    moved = [padded[:, :, tap, tap // 3 : tap // 3 + height, tap % 3 : tap % 3 + width] for tap in range(9)]
    return (torch.stack(moved).sum(0) + bias[:, None, None]).permute(0, 2, 3, 1)


def given_taps(shape, dtype):
    """Of the second kernel: fp32, that all formats of half precision hold, and a bias."""
    taps = torch.randn(shape[0], 9 * shape[4], *shape[1:3], generator=torch.Generator().manual_seed(5)).bfloat16().float()
    return taps, inputs(shape, dtype)[4]


def check(taps, y, shape, dtype, name):
    given = inputs(shape, dtype)
    wide = [t.double() for t in given]
    assert taps.dtype == torch.float32
    assert_parity(taps.cpu(), same=plain_taps(*given), exact=plain_taps(*wide), name=f"{name} taps")
    assert y.dtype == given[0].dtype
    assert_parity(y.cpu(), same=plain(*given), exact=plain(*wide), name=f"{name} y")


def check_sum(y, shape, dtype, name):
    taps, bias = given_taps(shape, dtype)
    exact = plain_sum(taps.double(), bias.double())
    assert_parity(y.cpu(), same=plain_sum(taps.to(bias.dtype), bias), exact=exact, name=name)


LAUNCH = """
from plugins import conv_taps as kernels
def first(like, *tensors):
    kernels.launch(*tensors)
def second(like, *tensors):
    kernels.launch_sum(*tensors)
def turned(like, taps, *rest):
    second(like, taps.flip(1).contiguous(), *rest)
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Taps and sums by shape, all from one process: of a NaN's too; last, sums of taps in the wrong order."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "taps_launch.py").write_text(LAUNCH)
    taps, sums = [], []
    for shape in SHAPES:
        *first, weight, _ = inputs(shape, "fp16")
        taps.append(((torch.empty(shape[0], 9 * shape[4], *shape[1:3]), *first, flat(weight)), {}))
    poisoned = [t.clone() for t in taps[0][0]]
    poisoned[1][1, 4, 2, 5] = torch.nan
    taps.append((tuple(poisoned), {}))
    for shape in SUMMED:
        sums.append(((torch.empty(*shape[:3], shape[4]).half(), *given_taps(shape, "fp16")), {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        *found, nan = interpret("taps_launch:first", taps)
        summed = interpret("taps_launch:second", sums)
        both = interpret(
            "taps_launch:second",
            [((torch.empty(*s[:3], s[4]).half(), f, inputs(s, "fp16")[4]), {}) for s, f in zip(SHAPES, found, strict=True)],
        )
        (wrong,) = interpret("taps_launch:turned", sums[:1])
    return {
        "both": dict(zip(SHAPES, zip(found, both, strict=True), strict=True)),
        "sum": dict(zip(SUMMED, summed, strict=True)),
        "nan": nan,
        "wrong": wrong,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(interpreted, shape):
    check(*interpreted["both"][shape], shape, "fp16", f"kernels {shape}")


@pytest.mark.parametrize("shape", SUMMED, ids=str)
def test_sums(interpreted, shape):
    check_sum(interpreted["sum"][shape], shape, "fp16", f"kernel {shape}")


def test_a_nan_stays_one(interpreted):
    """In all that its pixel gives, and nowhere else: a picture that is no number is found by it."""
    bad = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    bad[1, 0, 4, 2] = True
    assert torch.equal(interpreted["nan"].isnan(), bad.expand(-1, 27, -1, -1))


def test_planted_error_is_caught(interpreted):
    with pytest.raises(AssertionError, match="expected at most"):
        check_sum(interpreted["wrong"], SUMMED[0], "fp16", "taps in the wrong order")


@pytest.mark.parametrize("dtype", [*HALVES, "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype):
    """The ops on a CPU are what both together mean."""
    *first, weight, bias = inputs(shape, dtype)
    taps = tap_ops.normed_taps(*first, flat(weight))
    check(taps, tap_ops.tap_sum(taps, bias), shape, dtype, f"op {dtype}")
    taps, bias = given_taps(shape, dtype)
    check_sum(tap_ops.tap_sum(taps, bias), shape, dtype, f"sum {dtype}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [*SUMMED, (2, 70, 65, 128, 3)], ids=str)
def test_ops_on_gpu(shape, dtype):
    *first, weight, bias = inputs(shape, dtype, "cuda")
    taps = tap_ops.normed_taps(*first, flat(weight))
    y = tap_ops.tap_sum(taps, bias)
    check(taps, y, shape, dtype, f"op {dtype}")
    assert torch.equal(tap_ops.tap_sum(tap_ops.normed_taps(*first, flat(weight)), bias), y)


def test_ops_are_registered_as_pytorch_asks():
    *first, weight, bias = inputs((2, 3, 4, 5, 2), "fp32")
    torch.library.opcheck(torch.ops.sana.normed_taps.default, (*first, flat(weight)))
    torch.library.opcheck(torch.ops.sana.tap_sum.default, (tap_ops.normed_taps(*first, flat(weight)), bias))


def test_what_plugin_and_truth_share():
    assert (op.MAX_CHANNELS, op.MAX_OUTPUTS) == (fused_decoder.MAX_NORM, fused_decoder.MAX_OUTPUTS)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_function_bodies(shape, dtype):
    """Both, one behind the other; taps is an output too."""
    *first, weight, bias = inputs(shape, dtype)
    channels, outputs = shape[3:]
    nodes = [
        helper.make_node(op.OP, op.INPUTS[op.OP], ["taps"], domain=op.DOMAIN, launch="unused"),
        helper.make_node(op.SUM, op.INPUTS[op.SUM], ["out"], domain=op.DOMAIN, channels=outputs),
    ]
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    sizes = (["b", "h", "w", channels], [channels], [channels], [channels, 9 * outputs], [outputs])
    fed = {name: (t, each) for name, t, each in zip(names, (*first, flat(weight), bias), sizes, strict=True)}
    made = {"taps": (torch.float32, ["b", 9 * outputs, "h", "w"]), "out": (bias.dtype, ["b", "h", "w", outputs])}
    taps, y = run_bodies(nodes, [op.function_body(name) for name in op.INPUTS], fed, made)
    check(taps, y, shape, dtype, f"bodies {shape} {dtype}")
    with pytest.raises(AssertionError, match="expected at most"):
        check(taps * 1.02, y, shape, dtype, "2 % too much")


@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
def test_cubins(target):
    """Of DC-AE's end and of the most channels. The launches that plugins compute from the JSON cover every pixel."""
    batch, height, width = 3, 33, 18
    for channels, outputs in ((128, 3), (256, 1)):
        taps = (batch, 9 * outputs, height, width)
        for name, dims, shape, block in (
            (op.OP, [(batch, height, width, channels)], taps, op.BLOCK_M),
            (op.SUM, [taps], (batch, height, width, outputs), op.SUM_BLOCK),
        ):
            attributes = op.compile_cubins(name, [target], "bf16", channels if name == op.OP else 1, outputs, eps=1e-3)
            launch = Launch.from_json(attributes["launch"])
            assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
            assert launch.inputs == (["bf16"] * 4 if name == op.OP else ["fp32", "bf16"])
            assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [*shape]
            assert launch.outputs[0].type == ("fp32" if name == op.OP else "bf16")
            assert [evaluate(size, dims) for size in launch.grid] == [-(-height * width // block), batch, 1]


@pytest.mark.parametrize(
    ("dtype", "channels", "outputs", "words"),
    [("fp32", 128, 3, "got dtype 'fp32'"), ("fp16", 257, 3, "got 257 channels in"), ("bf16", 128, 4, "4 out; expected")],
)
def test_bad_sizes(dtype, channels, outputs, words):
    with pytest.raises(ValueError, match=words):
        op.compile_cubins(op.OP, ["sm80"], dtype, channels, outputs)


def test_wrong_tensors():
    *first, weight, bias = inputs(SHAPES[0], "fp16")
    taps = torch.empty(2, 27, 5, 7)
    for given in ((*first, weight.flatten(1), taps), (*first, flat(weight), taps.half()), (*first, flat(weight).T, taps)):
        with pytest.raises(ValueError, match=r"NormedTaps: got .*; expected \(B, h, w, C\)"):
            op.launch(*given)
    with pytest.raises(ValueError, match=r"TapSum: got .*; expected \(B, 9 N, h, w\) fp32"):
        op.launch_sum(taps, bias, torch.empty(2, 5, 7, 3))
    with pytest.raises(ValueError, match=r"normed_taps: got x, norm_weight, norm_bias, weight of shapes"):
        tap_ops.normed_taps(*first, flat(weight)[:, :-1])
    with pytest.raises(ValueError, match=r"normed_taps: got dtypes"):
        tap_ops.normed_taps(*first, flat(weight).float())
    with pytest.raises(ValueError, match=r"tap_sum: got taps, bias of shapes"):
        tap_ops.tap_sum(taps, bias[:2])
    with pytest.raises(ValueError, match=r"tap_sum: got taps, bias of dtypes"):
        tap_ops.tap_sum(taps.half(), bias)
