"""The kernels (interpreted on a CPU, or on a GPU) and cubins of conv3x3_quantized and static_quantize, against PyTorch in fp64."""

import json
import re
import subprocess

import pytest
import torch
import triton
import triton.language as tl
from parity.bound import assert_parity
from parity.eight_bits import TARGETS_OF, assert_bits
from parity.interpreter import interpret
from torch.nn import functional as F
from triton.language.semantic import TritonSemantic

from plugins import conv3x3, cubin
from plugins import conv3x3_quantized as op
from plugins import static_quantize as quantize
from plugins.eight_bits import KINDS, LARGEST
from plugins.launch import Launch, evaluate
from sana_ref import conv_ops
from sana_ref.quantize_ops import quantize_weight

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NORM = conv3x3.NORM
OPS = {of: name for name, of in op.OPS.items()}  # by numbers and the op of conv3x3
# (B, h, w, C, N): few channels out, sides and channels that no block divides, one pixel, several blocks of both
SHAPES = [(2, 5, 7, 32, 3), (1, 9, 15, 80, 130), (1, 1, 1, 64, 16), (1, 33, 36, 16, 130)]
ENDS = ("none", "relu", "silu", NORM)
CASES = [(SHAPES[1], "silu", False), (SHAPES[1], NORM, True), (SHAPES[0], NORM, False), (SHAPES[0], "silu", True)]
MORE = [(SHAPES[0], "none", False), (SHAPES[0], "relu", True), (SHAPES[2], NORM, True), (SHAPES[3], "none", True)]
ALL = [
    *(("fp8", case) for case in (*CASES, *MORE)),
    *(("int8", case) for case in CASES),
]
SPREAD = {"fp8": 100, "int8": 40}  # of x
SCALES = {"fp8": 1 / 256, "int8": 1 / 32}  # of the pass


def numbers(kind, real):
    """As bits, int8."""
    real = real.clamp(-LARGEST[kind], LARGEST[kind])
    return real.to(torch.float8_e4m3fn).view(torch.int8) if kind == "fp8" else real.round().to(torch.int8)


def real_of(kind, bits):
    return bits.view(torch.float8_e4m3fn) if kind == "fp8" else bits


def inputs(kind, shape, end, dtype="fp16", device="cpu"):
    """In the order of op.INPUTS. Scales differ from channel to channel, and bits use all of their range."""
    batch, height, width, channels, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(size, generator=generator)

    x = numbers(kind, random(batch, height, width, channels) * SPREAD[kind])
    weight = quantize_weight(random(outputs, 9 * channels), kind, "weight")
    tensors = [
        x,
        weight.numbers.view(torch.int8).unflatten(1, (3, 3, -1)),
        weight.scale / SPREAD[kind] / (9 * channels) ** 0.5,
    ]
    others = [random(batch, height, width, outputs), random(outputs), random(outputs)] if end == NORM else [random(outputs)]
    return [t.to(device) for t in (*tensors, *(t.to(DTYPES[dtype]) for t in others))]


def convolved(kind, x, weight, scales):
    """At the scales' precision."""
    real = [real_of(kind, t).to(scales.dtype).permute(0, 3, 1, 2) for t in (x, weight)]
    return F.conv2d(*real, padding=1).permute(0, 2, 3, 1) * scales


def ended(end, conv, *others):
    """At conv's precision."""
    others = [t.to(conv.dtype) for t in others]
    if end != NORM:
        return conv_ops.ACTIVATIONS[end](conv + others[0])
    residual, norm_weight, norm_bias = others
    return residual + conv * torch.rsqrt(conv.square().mean(-1, keepdim=True) + op.EPS) * norm_weight + norm_bias


def exactly(kind, end, x, weight, scales, *others):
    return ended(end, convolved(kind, x, weight, scales.double()), *others)


def out_scale_of(kind, given, end):
    """Half of what would do: the largest numbers are cut off."""
    return (exactly(kind, end, *(t.cpu() for t in given)).abs().max() / LARGEST[kind] / 2).float().item()


def check(kind, y, bits, given, end, out_scale, name, peer=None):
    """peer: PyTorch's result of the sum, fp32; else PyTorch sums in fp32 as well."""
    x, weight, scales, *others = given = [t.cpu() for t in given]
    exact = exactly(kind, end, *given)
    same = ended(end, convolved(kind, x, weight, scales) if peer is None else peer.cpu(), *others)
    if y is not None:
        assert y.dtype == others[-1].dtype
        assert_parity(y.cpu(), same=same.to(y.dtype), exact=exact, name=f"{name} {end}")
    if bits is not None:
        # Twice PyTorch's own error, and the roundings of a number times a reciprocal. SiLU is one instruction on a GPU, as exact as
        # PyTorch's in fp16 (plugins/silu.py), not as one in fp32.
        peer = same.half() if end == "silu" and bits.is_cuda else same
        tolerance = 2 * (peer.double() - exact).abs().max() / out_scale + (exact / out_scale).abs() * 2.0**-21
        assert_bits(kind, bits.cpu(), exact / out_scale, tolerance, f"{name} {end} bits")
        assert (real_of(kind, bits.cpu()).float().abs() == LARGEST[kind]).any()


LAUNCH = """
import torch
from plugins import conv3x3, conv3x3_quantized as kernels, static_quantize
OPS = {of: name for name, of in kernels.OPS.items()}
def unwritten(kind, shape, device="cpu"):
    '''Bits of NaN, or of what is no number of INT8 here.'''
    return torch.full(shape, -1 if kind == "fp8" else -128, dtype=torch.int8, device=device)
def run(kind, end, out_scale, *given):
    '''y and bits, one of them None where there is one.'''
    shape, half = (*given[0].shape[:3], given[1].shape[0]), given[-1]
    y = half.new_full(shape, float("nan"))
    bits = None if out_scale is None else unwritten(kind, shape, half.device)
    if end == conv3x3.NORM:
        kernels.launch_norm(OPS[kind, end], *given, y, bits, out_scale)
        return y, bits
    kernels.launch(OPS[kind, conv3x3.OP], *given, y if bits is None else bits, end, out_scale)
    return (y, None) if bits is None else (None, bits)
def launch(out, *given, kind, end, out_scale):
    *given, result = given
    for place, found in enumerate(run(kind, end, out_scale, *given)):
        if found is not None:
            result[place] = found
def turned(out, x, weight, *rest, **options):
    launch(out, x, weight.flip(2), *rest, **options)
def quantized(out, x, result, kind, scale):
    bits = unwritten(kind, x.shape)
    static_quantize.launch(kind, x, bits, scale)
    result[:] = bits
"""


def to_quantize():
    """More numbers than a program has; the largest is cut off, some are halfway between whole ones, one is NaN."""
    x = torch.randn(3, 5, 7, 40, generator=torch.Generator().manual_seed(1)).half()
    x[0, 0, 0] = (torch.arange(40) - 20 + 0.5) / 32
    x[0, 0, 1, 0] = 10
    x[1, 2, 3, 4] = torch.nan
    return x


def large_sums():
    """Inputs of an INT8 convolution whose sums pass 2^24, fp32's whole numbers, on the way to 127 in the middle."""
    x, weight = torch.full((1, 3, 3, 512), 127, dtype=torch.int8), torch.zeros(16, 3, 3, 512, dtype=torch.int8)
    taps = weight.view(16, 9, 512)
    taps[:, :4], taps[:, 4:8], taps[:, 8, 0] = 127, -127, 1
    return x, weight, torch.ones(16), torch.zeros(16).half()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(y, bits) by numbers and case; by "wrong", those of filters turned round; by "quantized", bits of `to_quantize`; y of "large"
    from `large_sums`."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "quantized_conv_launch.py").write_text(LAUNCH)
    calls = []
    for kind, (shape, end, quantized) in ALL:
        given = inputs(kind, shape, end)
        options = {"kind": kind, "end": end, "out_scale": out_scale_of(kind, given, end) if quantized else None}
        calls.append(((torch.empty(2, *shape[:3], shape[4]), *given), options))
    wrong = [calls[ALL.index((kind, CASES[0]))] for kind in KINDS]
    calls.append(((torch.empty(2, 1, 3, 3, 16), *large_sums()), {"kind": "int8", "end": "none", "out_scale": None}))
    x = to_quantize()
    passes = [((x.float(), x), {"kind": kind, "scale": SCALES[kind]}) for kind in KINDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        *outputs, large = interpret("quantized_conv_launch:launch", calls)
        outputs += interpret("quantized_conv_launch:turned", wrong)
        bits = interpret("quantized_conv_launch:quantized", passes)
    keys = [*ALL, *((kind, "wrong") for kind in KINDS)]
    found = {key: (out[0].half(), out[1].nan_to_num().to(torch.int8)) for key, out in zip(keys, outputs, strict=True)}
    return found | {(kind, "quantized"): each.to(torch.int8) for kind, each in zip(KINDS, bits, strict=True)} | {"large": large[0]}


def seen(kind, case, y, bits, name):
    shape, end, quantized = case
    given = inputs(kind, shape, end)
    check(
        kind,
        y if end == NORM or not quantized else None,
        bits if quantized else None,
        given,
        end,
        out_scale_of(kind, given, end),
        f"{name} {kind} {shape}",
    )


@pytest.mark.parametrize(("kind", "case"), ALL, ids=str)
def test_kernels(interpreted, kind, case):
    seen(kind, case, *interpreted[kind, case], "kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_planted_errors_are_caught(interpreted, kind):
    with pytest.raises(AssertionError, match="expected at most"):
        seen(kind, CASES[0], *interpreted[kind, "wrong"], "filters turned round")
    y, bits = interpreted[kind, CASES[1]]
    with pytest.raises(AssertionError, match="values are wrong"):
        seen(kind, CASES[1], y, bits.roll(1, -1), "another place")


def check_static(kind, bits):
    """INT8's scale is a power of two, so that ties are ties."""
    exact = to_quantize().double() / SCALES[kind]
    assert_bits(kind, bits, exact, exact.abs() * (2.0**-21 if kind == "fp8" else 0), "static quantize")


@pytest.mark.parametrize("kind", KINDS)
def test_static_quantize(interpreted, kind):
    check_static(kind, interpreted[kind, "quantized"])


def test_int8_sums_are_exact(interpreted):
    assert (interpreted["large"][0, 1, 1] == 127).all()


def product_of_fp8(x, weight, scales):
    """PyTorch's own, whose sums the tensor core makes as well."""
    batch, height, width, channels = x.shape
    outputs = len(weight)
    # im2col of the bits as numbers that fp16 has; sides padded to what the product takes
    real = x.view(torch.float8_e4m3fn).half().permute(0, 3, 1, 2)
    rows = F.unfold(real, 3, padding=1).unflatten(1, (channels, 9)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    pad, more = -outputs % 16, -rows.shape[1] % 16
    left = F.pad(rows, (0, more)).to(torch.float8_e4m3fn)
    right = F.pad(weight.view(torch.float8_e4m3fn).half().flatten(1), (0, more, 0, pad)).to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    product = torch._scaled_mm(left, right.T, one, one, out_dtype=torch.float32, use_fast_accum=True)
    return product[:, :outputs].unflatten(0, (batch, height, width)) * scales


@pytest.fixture(scope="module")
def names():
    """What LAUNCH defines."""
    found: dict[str, object] = {}
    exec(LAUNCH, found)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 33, 128, 128), (1, 64, 64, 256, 256), (3, 17, 16, 512, 208)], ids=str)
def test_kernels_on_gpu(names, shape, end, dtype, kind):
    """FP8 beside PyTorch's own product; INT8 beside its convolution in fp32."""
    given = inputs(kind, shape, end, dtype, "cuda")
    peer = product_of_fp8(*given[:3]) if kind == "fp8" else None
    for out_scale in (None, out_scale_of(kind, given, end)):
        y, bits = names["run"](kind, end, out_scale, *given)
        check(kind, y, bits, given, end, out_scale, f"kernel {kind} {shape} {dtype}", peer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_int8_sums_on_gpu_are_exact(names):
    y, _ = names["run"]("int8", "none", None, *(t.cuda() for t in large_sums()))
    assert (y[0, 1, 1] == 127).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_static_quantize_on_gpu(names, kind):
    x = to_quantize()
    bits = names["unwritten"](kind, x.shape, "cuda")
    quantize.launch(kind, x.cuda(), bits, SCALES[kind])
    check_static(kind, bits.cpu())


TARGETS = [("Fp8Conv3x3", "sm90"), ("Fp8Conv3x3Norm", "sm90"), ("Int8Conv3x3", "sm80"), ("Int8Conv3x3Norm", "sm80")]
SLOW_TARGETS = [
    (name, target)
    for name, (kind, _) in op.OPS.items()
    for target in (*(("sm86", "sm90") if kind == "int8" else ()), "sm89", "sm100", "sm120")
]


@pytest.mark.parametrize("out_scale", [pytest.param(None, marks=pytest.mark.slow), 0.25])
@pytest.mark.parametrize(("name", "target"), [*TARGETS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_TARGETS)])
def test_cubins(name, target, out_scale):
    """The launch covers every pixel and channel; outputs and numbers are in the kernel's order."""
    batch, height, width, channels, outputs = 3, 33, 18, 32, 200
    norm = op.OPS[name][1] == NORM
    made = op.compile_cubins(name, [target], "bf16", channels, outputs, eps=1e-3, out_scale=out_scale)
    launch = Launch.from_json(made["launch"])
    assert launch.cubin(made["cubins"], target)[:4] == b"\x7fELF"
    assert launch.inputs[:3] == ["int8", "int8", "fp32"]
    assert set(launch.inputs[3:]) == {"bf16"}
    kinds = (["bf16"], ["bf16", "int8"]) if norm else (["bf16"], ["int8"])
    assert [output.type for output in launch.outputs] == kinds[out_scale is not None]
    dims = [(batch, height, width, channels)]
    assert all([evaluate(size, dims) for size in output.shape] == [batch, height, width, outputs] for output in launch.outputs)
    chosen = op.plan(name, int(target.removeprefix("sm")), channels, outputs)
    columns = 1 if norm else -(-outputs // chosen.block_n)
    assert [evaluate(size, dims) for size in launch.grid] == [-(-height * width // chosen.block_m) * columns, batch, 1]
    numbers = [arg for arg in json.loads(launch.to_json())["args"] if arg[0] in ("i32", "f32")]
    assert [evaluate(arg[1], dims) for arg in numbers[:2]] == [height, width]
    assert [arg[1] for arg in numbers[2:]] == [*([1e-3] if norm else []), *([out_scale] if out_scale else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_need_no_default_of_newer_triton(monkeypatch, kind):
    """Before 3.8 a product without out_dtype is fp32, and sums of another type are refused; since then it is of the sums' type."""
    dot = TritonSemantic.dot

    def older(self, lhs, rhs, acc, input_precision, max_num_imprecise_acc, out_dtype):
        return dot(self, lhs, rhs, acc, input_precision, max_num_imprecise_acc, tl.float32 if out_dtype is None else out_dtype)

    monkeypatch.setattr(TritonSemantic, "dot", older)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")  # not from Triton's cache on disk
    assert op.compile_cubin.__wrapped__(OPS[kind, conv3x3.OP], 90, "fp16", 32, 16).code[:4] == b"\x7fELF"


def disassembled(tmp_path, name, capability):
    """At a size of DC-AE."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(op.compile_cubin(name, capability, "bf16", 256, 256, quantized=True).code)
    return subprocess.run([triton.knobs.nvidia.nvdisasm.path, path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("name", "capability"),
    [("Int8Conv3x3", 86), *(pytest.param(name, 80, marks=pytest.mark.slow) for name in ("Int8Conv3x3", "Int8Conv3x3Norm"))],
)
def test_tensor_cores_multiply_int8(tmp_path, name, capability):
    """And no register is spilled, as where Triton carries weights byte by byte (plugins/conv3x3_kernels.py)."""
    code = disassembled(tmp_path, name, capability)
    assert "IMMA.16832.S8.S8" in code
    assert not re.search(r"\b(LDL|STL)\b", code)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Int8Conv3x3", "Int8Conv3x3Norm"])
def test_hopper_multiplies_int8_by_warp_groups(tmp_path, name):
    assert re.search(r"\bIGMMA\.64x\d+x32\.S8\.S8", disassembled(tmp_path, name, 90))


@pytest.mark.parametrize(
    ("kind", "target"),
    [pytest.param(kind, sm, marks=() if sm == "sm90" else pytest.mark.slow) for kind in KINDS for sm in TARGETS_OF[kind]],
)
def test_cubins_of_static_quantize(kind, target):
    made = quantize.compile_cubins(kind, [target], "bf16", 130, 4, 0.25)
    launch = Launch.from_json(made["launch"])
    assert launch.cubin(made["cubins"], target)[:4] == b"\x7fELF"
    assert launch.op == quantize.OP[kind]
    dims = [(2, 9, 15, 130)]
    assert [evaluate(size, dims) for size in launch.outputs[0].shape] == list(dims[0])
    assert evaluate(launch.grid[0], dims) == -(-2 * 9 * 15 * 130 // quantize.BLOCK)
    assert [arg for arg in json.loads(launch.to_json())["args"] if arg[0] == "f32"] == [["f32", 0.25]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, sm) for name, (kind, _) in op.OPS.items() for sm in cubin.CAPABILITIES if kind == "int8" or sm >= 89],
)
def test_largest_blocks_fit(name, capability):
    made = op.compile_cubin(name, capability, "bf16", conv3x3.MAX_NORM, conv3x3.MAX_NORM, quantized=True)
    assert made.shared <= cubin.max_shared(capability)


@pytest.mark.parametrize(
    ("name", "target", "dtype", "sizes", "activation", "message"),
    [
        ("Fp8Conv3x3", "sm86", "bf16", (64, 64), "none", "got target sm86; expected sm89 or newer"),
        ("Int8Conv3x3", "sm75", "bf16", (64, 64), "none", "got target sm75; expected one of sm80, "),
        ("Fp8Conv3x3", "sm90", "fp32", (64, 64), "none", "got dtype 'fp32'; expected one of fp16, bf16"),
        ("Int8Conv3x3", "sm90", "bf16", (0, 64), "none", "got 0 channels in, 64 out; expected some"),
        ("Int8Conv3x3", "sm90", "bf16", (64, 64), "gelu", "got activation 'gelu'; expected one of none, relu, silu"),
        ("Fp8Conv3x3Norm", "sm90", "bf16", (64, 257), "none", "got 257 channels out; expected at most 256"),
        (
            "Int8Conv3x3",
            "sm80",
            "bf16",
            (14794, 64),
            "none",
            "got 14794 channels in; expected at most 14793, whose sums fit",
        ),
    ],
)
def test_bad_arguments(name, target, dtype, sizes, activation, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(name, [target], dtype, *sizes, activation=activation)


def test_wrong_tensors():
    x, weight, scales, bias = inputs("int8", SHAPES[0], "none")
    y = torch.zeros(2, 5, 7, 3, dtype=torch.float16)
    for wrong in ((x.half(), weight, scales, bias, y), (x, weight, scales.half(), bias, y), (x, weight, scales, bias, y.float())):
        for name in ("Fp8Conv3x3", "Int8Conv3x3"):
            with pytest.raises(ValueError, match=rf"{name}: got x, weight, scales, bias, y and bits .* expected x \(B, h, w, C\)"):
                op.launch(name, *wrong)
    with pytest.raises(ValueError, match="Int8Conv3x3Norm: got bits alone; expected both or neither"):
        op.launch_norm("Int8Conv3x3Norm", *inputs("int8", SHAPES[0], NORM), y, y.to(torch.int8))
    with pytest.raises(ValueError, match=r"Int8StaticQuantize: got .*; expected x fp16 or bf16, bits int8"):
        quantize.launch("int8", y, y, 1.0)
