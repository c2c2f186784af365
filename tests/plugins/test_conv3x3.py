"""The kernels (interpreted on a CPU, or on a GPU), ONNX function bodies and cubins of conv3x3, against PyTorch in fp64."""

import json

import pytest
import torch
from attention_graph import DTYPES
from function_bodies import run_bodies
from onnx import helper
from parity.bound import assert_parity
from parity.interpreter import interpret
from torch.nn import functional as F

from plugins import conv3x3 as op
from plugins import cubin
from plugins.launch import Launch, evaluate
from sana_ref import conv_ops
from sana_ref.layers import RMSNorm

# (B, h, w, C, N): few channels out, sides and channels that no block divides, one pixel
SHAPES = [(2, 5, 7, 32, 3), (1, 9, 15, 70, 130), (1, 1, 1, 64, 16)]
GROUPS = (1, 33, 36, 16, 130)  # more blocks of pixels than a group has, and two of channels
KINDS = ("none", "relu", "silu", op.NORM)  # activations of OP, and the other op
INTERPRETED = [
    *((shape, dtype, kind) for shape in SHAPES for dtype in ("fp16", "fp32") for kind in ("silu", op.NORM)),
    (SHAPES[0], "fp16", "none"),
    (SHAPES[0], "fp16", "relu"),
    (GROUPS, "fp16", "none"),
]  # not bf16, on a GPU only: Triton 3.9's interpreter multiplies its bits as if they were whole numbers


def inputs(shape, dtype, kind, device="cpu"):
    """In the order of op.INPUTS."""
    batch, height, width, channels, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(batch, height, width, channels), (outputs, 3, 3, channels)]
    sizes += [(batch, height, width, outputs), (outputs,), (outputs,)] if kind == op.NORM else [(outputs,)]
    return [torch.randn(size, generator=generator).to(device, DTYPES.get(dtype, dtype)) for size in sizes]


def plain(kind, x, weight, *others):
    """Operator by operator, as sana_ref.autoencoder.ResBlock."""
    x, weight = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    if kind != op.NORM:
        return conv_ops.ACTIVATIONS[kind](F.conv2d(x, weight, *others, padding=1)).permute(0, 2, 3, 1)
    residual, norm_weight, norm_bias = others
    norm = RMSNorm(len(weight), bias=True, axis=1).to(x)
    norm.weight.data, norm.bias.data = norm_weight, norm_bias
    return residual + norm(F.conv2d(x, weight, padding=1)).permute(0, 2, 3, 1).detach()


def run(kind, *given):
    return conv_ops.conv3x3_norm(*given) if kind == op.NORM else conv_ops.conv3x3(*given, kind)


def check(got, given, kind, name):
    assert got.dtype == given[0].dtype
    assert got.is_contiguous()
    same, exact = plain(kind, *given), plain(kind, *(t.double() for t in given))
    assert_parity(got.cpu(), same=same.cpu(), exact=exact.cpu(), name=f"{name} {kind}")


LAUNCH = """
from plugins import conv3x3 as kernels
def launch(out, *tensors, kind):
    *inputs, result = tensors
    if kind == kernels.NORM:
        kernels.launch_norm(*inputs, result)
    else:
        kernels.launch(*inputs, result, kind)
def turned(out, x, weight, *rest, kind):
    launch(out, x, weight.flip(2), *rest, kind=kind)
"""


def poisoned(kind):
    """One number of x is NaN, beside a border and away from the others."""
    given = inputs(SHAPES[0], "fp16", kind)
    given[0][1, 4, 2, 5] = torch.nan
    return given


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Outputs by case and of `poisoned`, all from one process; last, one whose filters are the wrong way round."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "conv_launch.py").write_text(LAUNCH)
    calls = []
    for shape, dtype, kind in INTERPRETED:
        out = torch.empty(*shape[:3], shape[4], dtype=DTYPES[dtype])
        calls.append(((out, *inputs(shape, dtype, kind)), {"kind": kind}))
    for kind in KINDS:
        calls.append(((torch.empty(*SHAPES[0][:3], SHAPES[0][4]).half(), *poisoned(kind)), {"kind": kind}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        outputs = interpret("conv_launch:launch", calls)
        wrong = interpret("conv_launch:turned", calls[:1])
    return dict(zip([*INTERPRETED, *(("nan", kind) for kind in KINDS)], outputs, strict=True)) | {"wrong": wrong[0]}


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernels(interpreted, case):
    check(interpreted[case], inputs(*case), case[2], f"kernel {case}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_one(interpreted, kind):
    """In the pixels around it, and nowhere else."""
    bad = torch.zeros(SHAPES[0][:3], dtype=torch.bool)
    bad[1, 3:, 1:4] = True
    assert torch.equal(interpreted["nan", kind].isnan(), bad[..., None].expand(*bad.shape, SHAPES[0][4]))


def test_planted_error_is_caught(interpreted):
    with pytest.raises(AssertionError, match="expected at most"):
        check(interpreted["wrong"], inputs(*INTERPRETED[0]), INTERPRETED[0][2], "filters turned round")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_truth(dtype, kind):
    given = inputs(SHAPES[1], dtype, kind)
    check(run(kind, *given), given, kind, f"op {dtype}")


def test_ops_are_registered_as_pytorch_asks():
    shape = (2, 3, 4, 5, 6)
    torch.library.opcheck(torch.ops.sana.conv3x3.default, (*inputs(shape, "fp32", "silu"), "silu"))
    torch.library.opcheck(torch.ops.sana.conv3x3_norm.default, tuple(inputs(shape, "fp32", op.NORM)))


def test_what_plugin_and_truth_share():
    assert op.EPS == conv_ops.NORM_EPS
    assert set(op.ACTIVATIONS) == set(conv_ops.ACTIVATIONS)


def run_body(kind, given):
    x, weight = given[:2]
    name, sides = op.NORM if kind == op.NORM else op.OP, ["b", "h", "w"]
    sizes = {"x": [*sides, x.shape[-1]], "weight": list(weight.shape), "residual": [*sides, len(weight)]}
    attributes = {"activation": kind} if kind in ("relu", "silu") else {}  # "none" and eps are the body's defaults
    node = helper.make_node(name, op.INPUTS[name], ["out"], domain=op.DOMAIN, launch="unused", **attributes)
    inputs = {each: (t, sizes.get(each, [len(weight)])) for each, t in zip(op.INPUTS[name], given, strict=True)}
    return run_bodies([node], [op.function_body(name)], inputs, {"out": (x.dtype, [*sides, len(weight)])})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_function_bodies(dtype, kind):
    """In ONNX Runtime, with an attribute of the plugin's on the node."""
    for shape in SHAPES:
        given = inputs(shape, dtype, kind)
        (got,) = run_body(kind, given)
        check(got, given, kind, f"body {shape} {dtype}")
        with pytest.raises(AssertionError, match="expected at most"):
            check(got * 1.02, given, kind, "2 % too much")


@pytest.mark.parametrize("name", [op.OP, op.NORM])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "outputs"), [(128, 128), (512, 250), (32, 3), (3, 17)])
def test_plan(name, dtype, channels, outputs):
    """Blocks are powers of two that tensor cores take, and of one size on all GPUs, whose cubins share a grid."""
    plans = [op.plan(name, capability, dtype, channels, outputs) for capability in cubin.CAPABILITIES]
    assert len({(each.block_m, each.block_n) for each in plans}) == 1
    for each in plans:
        sides = (each.block_m, each.block_n, each.block_k)
        assert all(side >= op.LEAST and side & (side - 1) == 0 for side in sides)
    assert name == op.OP or plans[0].block_n >= outputs


@pytest.mark.parametrize("name", [op.OP, op.NORM])
@pytest.mark.parametrize(
    "target", ["sm80", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm86", "sm89", "sm90", "sm100", "sm120"))]
)
def test_cubins(target, name):
    """The launch that the plugin computes from the JSON covers every pixel and channel, and no program is in vain."""
    batch, height, width, channels, outputs = 3, 33, 18, 32, 200
    attributes = op.compile_cubins(name, [target], "bf16", channels, outputs, eps=1e-3)
    launch = Launch.from_json(attributes["launch"])
    assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
    assert launch.inputs == ["bf16"] * len(op.INPUTS[name])
    dims = [(batch, height, width, channels)]
    assert [evaluate(size, dims) for size in launch.outputs[0].shape] == [batch, height, width, outputs]
    chosen = op.plan(name, int(target.removeprefix("sm")), "bf16", channels, outputs)
    rows, columns = -(-height * width // chosen.block_m), -(-outputs // chosen.block_n)
    assert [evaluate(size, dims) for size in launch.grid] == [rows * columns, batch, 1]
    assert chosen.programs(name, height * width, outputs) == rows * columns
    arguments = [arg for arg in json.loads(launch.to_json())["args"] if arg[0] in ("i32", "f32")]
    assert [evaluate(arg[1], dims) for arg in arguments[:2]] == [height, width]
    assert arguments[2:] == ([["f32", 1e-3]] if name == op.NORM else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", [op.OP, op.NORM])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", cubin.CAPABILITIES)
def test_largest_blocks_fit(capability, dtype, name):
    assert op.compile_cubin(name, capability, dtype, op.MAX_NORM, op.MAX_NORM).shared <= cubin.max_shared(capability)


@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "activation", "message"),
    [
        (op.OP, "int8", (64, 64), "none", "got dtype 'int8'; expected one of fp16, bf16, fp32"),
        (op.OP, "fp16", (0, 64), "none", "got 0 channels in, 64 out; expected some"),
        (op.OP, "fp16", (64, 64), "gelu", "got activation 'gelu'; expected one of none, relu, silu"),
        (op.NORM, "fp16", (64, 257), "none", "got 257 channels out; expected at most 256, which one program holds"),
    ],
)
def test_bad_arguments(name, dtype, sizes, activation, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(name, ["sm89"], dtype, *sizes, activation=activation)


def test_wrong_tensors():
    x, weight, bias = inputs(SHAPES[0], "fp32", "none")
    with pytest.raises(
        ValueError, match=r"conv3x3: got x, weight, bias of shapes .* expected \(B, h, w, C\), \(N, 3, 3, C\), \(N,\)"
    ):
        conv_ops.conv3x3(x, weight.permute(0, 3, 1, 2), bias)
    with pytest.raises(ValueError, match=r"got x, weight, bias of dtypes .* expected one floating dtype for all"):
        conv_ops.conv3x3(x, weight.half(), bias)
    with pytest.raises(ValueError, match="got activation 'gelu'; expected one of none, relu, silu"):
        conv_ops.conv3x3(x, weight, bias, "gelu")
    with pytest.raises(ValueError, match=r"residual, norm_weight, norm_bias of shapes .* \(B, h, w, N\), \(N,\), \(N,\)"):
        conv_ops.conv3x3_norm(x, weight, x, bias, bias)
    with pytest.raises(ValueError, match=r"Conv3x3: got x, weight, bias, y .*; expected x \(B, h, w, C\)"):
        op.launch(x, weight, bias, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, GROUPS, (2, 40, 33, 128, 128), (1, 64, 64, 256, 256), (3, 17, 16, 512, 200)], ids=str)
def test_ops_on_gpu(shape, dtype, kind):
    """In fp32 the ops are their truths."""
    given = inputs(shape, dtype, kind, "cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = run(kind, *given)
        check(got, given, kind, f"op {shape} {dtype}")
        assert torch.equal(run(kind, *given), got)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["none", op.NORM])
def test_a_picture_of_more_elements_than_32_bits_count(kind):
    """Its last rows are those of a picture of the last rows alone."""
    shape = (1, 4100, 4096, 128, 128)
    given = [torch.randn(t.shape, device="cuda", dtype=torch.bfloat16) for t in inputs((1, 1, 1, 128, 128), "bf16", kind)[1:]]
    x = torch.randn(shape[:4], device="cuda", dtype=torch.bfloat16)
    weight, *others = given
    whole = [x if t.ndim == 4 else t for t in others]  # x is the residual, too
    last = [x[:, -9:] if t.ndim == 4 else t for t in others]
    assert torch.equal(run(kind, x, weight, *whole)[:, -8:], run(kind, x[:, -9:], weight, *last)[:, -8:])
