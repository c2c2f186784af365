"""The kernel (interpreted on a CPU, or on a GPU) and cubins of fp8_quantize."""

import json

import pytest
import torch
from attention_graph import DTYPES
from parity.eight_bits import assert_e4m3, quantized_truth
from parity.interpreter import interpret

from plugins import cubin
from plugins import fp8_quantize as op
from plugins.launch import Launch, evaluate
from sana_ref.fp8 import quantize_rows

INTERPRETED = ("fp16", "fp32")  # not bf16, on a GPU only: Triton 3.9's interpreter cuts off where a GPU rounds to nearest
SHAPES = [(7, 64), (2, 3, 100), (2, 2, 2, 2240), (3, 1), (1, 5600)]


def rows(shape, dtype):
    """Normal, of another magnitude in each row; three rows and more: one of zeros, and one with one huge value."""
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1, shape[-1])
    flat *= torch.logspace(-3, 3, len(flat))[:, None]
    if len(flat) > 2:
        flat[1] = 0
        flat[2, shape[-1] // 2] = -60000
    return x.to(DTYPES[dtype])


def awkward():
    """Rows of 70 channels and fp32 that end where numbers do."""
    x = torch.randn(7, 70, generator=torch.Generator().manual_seed(0))
    x[0, 69], x[1, 3], x[2, 0] = float("nan"), float("inf"), -float("inf")
    x[3] *= 1e-38  # scales that are no normal numbers
    x[4] *= 2.0**-149
    x[5, 1] = 3.4e38
    x[6] = float("nan")
    return x


def check(got, x, name):
    bits, scale = got
    exact, largest = quantized_truth(x.cpu())
    torch.testing.assert_close(scale.cpu(), largest, rtol=0, atol=0, equal_nan=True)
    # The kernel's reciprocal and product and the truth's division cost half a unit in the last place each, of 24 bits.
    assert_e4m3(bits.cpu(), exact, exact.abs() * 2.0**-22, name)


LAUNCH = """
import torch
from plugins import fp8_quantize as kernel
def launch(out, x, result):
    bits, scale = torch.full(x.shape, -1, dtype=torch.int8), torch.full(x.shape[:-1], float("nan"))  # -1 is NaN's bits
    kernel.launch(x, bits, scale)
    result[..., :-1], result[..., -1] = bits.float(), scale
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """(bits, scale) by shape and dtype, and of `awkward`."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "quantize_launch.py").write_text(LAUNCH)
    given = {(shape, dtype): rows(shape, dtype) for shape in SHAPES for dtype in INTERPRETED} | {"awkward": awkward()}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        calls = [((torch.empty(*x.shape[:-1], x.shape[-1] + 1), x), {}) for x in given.values()]
        outputs = interpret("quantize_launch:launch", calls)
    return {name: (out[..., :-1].to(torch.int8), out[..., -1]) for name, out in zip(given, outputs, strict=True)}


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(interpreted, shape, dtype):
    x = rows(shape, dtype)
    bits, scale = interpreted[shape, dtype]
    check((bits, scale), x, f"kernel {shape} {dtype}")
    empty = (x == 0).all(-1)
    assert not bits[empty].any()
    assert (scale[empty] == 2.0**-126).all()
    assert (bits[~empty].view(torch.float8_e4m3fn).float().abs().amax(-1) == 448).all()
    same, same_scale = quantize_rows(x)  # which takes the reciprocal as well
    assert torch.equal(bits, same.view(torch.int8))
    assert torch.equal(scale, same_scale)


def test_what_is_not_finite_stays_so(interpreted):
    x = awkward()
    bits, scale = interpreted["awkward"]
    check((bits, scale), x, "awkward")
    values = bits.view(torch.float8_e4m3fn).float()
    assert values[[0, 6]].isnan().all()
    assert scale[[0, 6]].isnan().all()
    for row, column in ((1, 3), (2, 0)):
        assert (scale[row].isinf(), values[row].isnan().nonzero().tolist()) == (True, [[column]])
    assert values[3:6].isfinite().all()
    assert scale[3:6].isfinite().all()


def test_planted_errors_are_caught(interpreted):
    x = rows(SHAPES[1], "fp32")
    bits, scale = interpreted[SHAPES[1], "fp32"]
    one_off = bits.clone()
    one_off[0, 0, 5] += 1
    with pytest.raises(AssertionError, match=r"one step: 1 of 600 values are wrong, the first at \(0, 0, 5\)"):
        check((one_off, scale), x, "one step")
    with pytest.raises(AssertionError, match="values are wrong"):
        check((bits.roll(1, -1), scale), x, "another place")
    with pytest.raises(AssertionError, match="not equal"):
        check((bits, scale * (1 + 2.0**-22)), x, "scale")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4096, 2240), (2, 1024, 5600)], ids=str)
def test_kernel_on_gpu(shape, dtype):
    """Where the conversion to e4m3 is the hardware's."""
    x = rows(shape, dtype).cuda()
    got = [(torch.full_like(x, -1, dtype=torch.int8), torch.full_like(x[..., 0], float("nan"), dtype=torch.float32)) for _ in "ab"]
    for bits, scale in got:
        op.launch(x, bits, scale)
    check(got[0], x, f"kernel {shape} {dtype}")
    assert all(torch.equal(one, other) for one, other in zip(*got, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_is_not_finite_stays_so_on_gpu():
    x = awkward().cuda()
    bits, scale = torch.zeros_like(x, dtype=torch.int8), torch.zeros_like(x[:, 0])
    op.launch(x, bits, scale)
    check((bits, scale), x, "awkward")


@pytest.mark.parametrize("rank", op.RANKS)
@pytest.mark.parametrize("target", ["sm89", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm90", "sm100", "sm120"))])
def test_cubins(target, rank):
    """What the plugin computes from the JSON: a program for each row, and the pointers in the kernel's order."""
    for dtype in DTYPES:
        attributes = op.compile_cubins([target], dtype, 2240, rank)
        launch = Launch.from_json(attributes["launch"])
        assert launch.cubin(attributes["cubins"], target)[:4] == b"\x7fELF"
        assert (launch.op, launch.inputs, [output.type for output in launch.outputs]) == (op.OP, [dtype], ["int8", "fp32"])
        dims = [(2, 3, 5)[: rank - 1]]
        shape = [*dims[0], 2240]
        assert [evaluate(size, [shape]) for size in launch.grid] == [torch.Size(dims[0]).numel(), 1, 1]
        assert [[evaluate(size, [shape]) for size in output.shape] for output in launch.outputs] == [shape, [*dims[0]]]
        assert json.loads(launch.to_json())["args"][:3] == [["in", 0], ["out", 0], ["out", 1]]


def test_bad_arguments():
    with pytest.raises(ValueError, match="got dtype 'int8'; expected one of fp16, bf16, fp32"):
        op.compile_cubins(["sm89"], "int8", 64, 3)
    for rank in (1, 5):
        with pytest.raises(ValueError, match=f"got x of {rank} dimensions; expected one of 2, 3, 4"):
            op.compile_cubins(["sm89"], "fp16", 64, rank)
    with pytest.raises(ValueError, match="got rows of 0 channels; expected at least 1"):
        op.compile_cubins(["sm89"], "fp16", 0, 3)
    for old in (sm for sm in cubin.CAPABILITIES if sm < 89):
        with pytest.raises(ValueError, match=f"Fp8Quantize: got target sm{old}; expected sm89 or newer"):
            op.compile_cubins(["sm90", f"sm{old}"], "fp16", 64, 3)
    x, bits, scale = torch.ones(2, 3, 16), torch.ones(2, 3, 16, dtype=torch.int8), torch.ones(2, 3)
    for wrong in (
        (x, bits, scale[:1]),
        (x, bits.view(torch.uint8), scale),
        (x.double(), bits, scale),
        (x, bits, scale.half()),
        (x.mT.contiguous().mT, bits, scale),
    ):
        with pytest.raises(ValueError, match=r"expected x and bits \(…, D\), scale \(…\), int8 and fp32"):
            op.launch(*wrong)
