"""The kernel (interpreted on a CPU, or on a GPU), the ONNX function body and the cubins of relu_linear_attention."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import triton
from attention_graph import DTYPES, HEADS, as_numpy, attention_model, qkv
from onnx import TensorProto, helper
from parity.bound import assert_parity
from parity.interpreter import interpret

from plugins import relu_linear_attention as op
from plugins.cubin import CAPABILITIES
from plugins.launch import Launch, evaluate
from sana_ref import ops

# tokens: 1, and around the tile of 64, and many; batch 1 to 4. Thousands of values, so that the largest error is not luck.
SHAPES = [(batch, HEADS, tokens) for batch, tokens in ((4, 1), (2, 63), (1, 64), (3, 65), (1, 1000))]
# q and k of this size bring relu(q) z down to eps, so that a wrong eps shows
SMALL = {"fp16": 2e-7, "bf16": 3e-9, "fp32": 3e-9}
WRONG_EPS = {"fp16": 1e-8, "fp32": 3e-15}  # fp16 values are multiples of 6e-8: no product of two goes below 3.6e-15


def cases(dtypes):
    """(name, inputs, dtype) of everything that each implementation must get right."""
    for dtype in dtypes:
        for batch, heads, tokens in SHAPES:
            yield f"B={batch} N={tokens} D=32 {dtype}", qkv((batch, heads, tokens, 32), dtype), dtype
        yield f"small {dtype}", qkv((2, HEADS, 70, 32), dtype, scale=SMALL[dtype]), dtype
        for head_dim in (16, 64, 128):
            yield f"N=70 D={head_dim} {dtype}", qkv((1, 2, 70, head_dim), dtype), dtype
        q, k, v = qkv((2, HEADS, 70, 32), dtype)
        together = torch.stack([q, k, v], 2).permute(0, 3, 2, 1, 4).contiguous()  # a projection's result: B, N, 3, H, D
        yield f"one projection {dtype}", tuple(together.permute(2, 0, 3, 1, 4)), dtype
        yield f"other strides {dtype}", (q.mT.contiguous().mT, k.transpose(1, 2).contiguous().transpose(1, 2), v), dtype


def planted(dtypes):
    """(name, (wrong inputs, keywords), right inputs, dtype): what the assertion must catch."""
    for dtype in dtypes:
        q, k, v = qkv((2, HEADS, 70, 32), dtype)
        scale = torch.ones(32).index_fill(0, torch.tensor(5), 1.01).to(v.dtype)
        yield f"swapped head {dtype}", ((q, k[:, [1, 0, *range(2, HEADS)]].contiguous(), v), {}), (q, k, v), dtype
        yield f"scaled channel {dtype}", ((q, k, v * scale), {}), (q, k, v), dtype
        small = qkv((2, HEADS, 70, 32), dtype, scale=SMALL[dtype])
        yield f"wrong eps {dtype}", (small, {"eps": WRONG_EPS[dtype]}), small, dtype


def check(got, inputs, name):
    """`inputs` (q, k, v) in the tested dtype; PyTorch in that dtype is the peer, float64 the exact answer."""
    same, exact = ops.relu_linear_attention_truth(*inputs), ops.relu_linear_attention_truth(*(t.double() for t in inputs))
    assert got.dtype == inputs[2].dtype
    assert_parity(got.cpu(), same=same.cpu(), exact=exact.cpu(), name=name)


INTERPRETED = ("fp16", "fp32")  # not bf16: see test_interpreter_cannot_do_bf16


@pytest.fixture(scope="module")
def interpreted():
    """Outputs of the kernel by case name, right and planted, all from one process."""
    triton_version, numpy_version = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np))
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        pytest.skip("Triton 3.6's interpreter takes the length of a loop in a way that numpy 2.4 refuses; 3.9 does not")
    named = {name: (inputs, {}) for name, inputs, _ in cases(INTERPRETED)}
    named |= {name: call for name, call, _, _ in planted(INTERPRETED)}
    q, k, v = qkv((1, 1, 70, 32), "fp16")
    named["nan"] = (q.index_fill(2, torch.tensor(3), float("nan")), k, v), {}
    named["bf16"] = qkv((1, 1, 70, 32), "bf16"), {}
    return dict(zip(named, interpret("plugins.relu_linear_attention:launch", list(named.values())), strict=True))


@pytest.mark.parametrize(("name", "inputs"), [pytest.param(*case[:2], id=case[0]) for case in cases(INTERPRETED)])
def test_kernel(interpreted, name, inputs):
    check(interpreted[name], inputs, name)


@pytest.mark.parametrize(("name", "right"), [pytest.param(case[0], case[2], id=case[0]) for case in planted(INTERPRETED)])
def test_planted_errors_are_caught(interpreted, name, right):
    with pytest.raises(AssertionError, match="expected at most"):
        check(interpreted[name], right, name)


def test_nan_in_q_comes_out_where_it_went_in(interpreted):
    bad_tokens = interpreted["nan"].isnan().any(-1)[0, 0].nonzero().flatten().tolist()
    assert bad_tokens == [3]


def test_interpreter_cannot_do_bf16(interpreted):
    """Why bf16 runs on a GPU only. When this fails, Triton has repaired its interpreter: add bf16 to INTERPRETED."""
    with pytest.raises(AssertionError, match="expected at most"):
        check(interpreted["bf16"], qkv((1, 1, 70, 32), "bf16"), "bf16")


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(("name", "inputs"), [pytest.param(*case[:2], id=case[0], marks=gpu) for case in cases(DTYPES)])
def test_kernel_on_gpu(name, inputs):
    q, k, v = (t.cuda() for t in inputs)
    out = torch.full_like(q, float("nan"))
    op.launch(q, k, v, out)
    check(out, (q, k, v), name)
    assert torch.equal(ops.relu_linear_attention(q, k, v), out), "the registered op must run this kernel, to the same bits"


def run_body(model, q, k, v):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"q": as_numpy(q), "k": as_numpy(k), "v": as_numpy(v)})[0])


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("with_cubins", [True, False])
def test_function_body(dtype, with_cubins):
    """In ONNX Runtime as it is, with the plugin's attributes and without."""
    model = attention_model(dtype, **(op.compile_cubins(["sm80"], dtype, 32) if with_cubins else {}))
    onnx.checker.check_model(model, full_check=True)
    for shape in SHAPES:
        inputs = qkv((*shape, 32), dtype)
        check(run_body(model, *inputs), inputs, f"function body {shape} {dtype}")
    inputs = qkv((2, HEADS, 70, 32), dtype, scale=SMALL[dtype])
    check(run_body(model, *inputs), inputs, f"function body small {dtype}")


@pytest.mark.parametrize(("name", "call", "right", "dtype"), [pytest.param(*case, id=case[0]) for case in planted(INTERPRETED)])
def test_planted_errors_in_the_body_are_caught(name, call, right, dtype):
    inputs, keywords = call
    with pytest.raises(AssertionError, match="expected at most"):
        check(run_body(attention_model(dtype, **keywords), *inputs), right, name)


def test_function_body_in_bf16():
    """ONNX Runtime has no bf16 on CPUs, so by onnx's own evaluator (which needs eps to be on the node)."""
    from onnx.reference import ReferenceEvaluator

    q, k, v = qkv((1, HEADS, 65, 32), "bf16")
    bf16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    feeds = {name: t.float().numpy().astype(bf16) for name, t in (("q", q), ("k", k), ("v", v))}
    out = ReferenceEvaluator(attention_model("bf16", eps=op.EPS)).run(None, feeds)[0]
    assert out.dtype == bf16
    check(torch.from_numpy(out.astype(np.float32)).bfloat16(), (q, k, v), "function body bf16")


def test_eps_is_the_truths():
    assert op.EPS == ops.EPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [f"sm{capability}" for capability in CAPABILITIES])
def test_cubins(target, dtype):
    """Each architecture and type on offer is an ELF file for that machine, without a path in it, that the launch describes."""
    attributes = op.compile_cubins([target], dtype, 32)
    launch = Launch.from_json(attributes["launch"])
    cubin = launch.cubin(attributes["cubins"], target)
    assert cubin[:4] == b"\x7fELF"
    flags = int.from_bytes(cubin[48:52], "little")  # e_flags: the architecture is its lowest byte, from SM 100 on the one above
    assert int(target[2:]) in (flags & 0xFF, flags >> 8 & 0xFF)
    assert launch.kernels[target].entry.encode() in cubin
    assert not any(leak in cubin for leak in (b".py", os.getcwd().encode(), tempfile.gettempdir().encode() + b"/"))
    assert (launch.inputs, launch.outputs[0].type) == ([dtype] * 3, dtype)


def test_cubins_of_several_targets_share_one_description():
    attributes = op.compile_cubins(["sm120", "sm80", "sm89", "sm80"], "fp16", 32)
    launch = Launch.from_json(attributes["launch"])
    assert list(launch.kernels) == ["sm120", "sm80", "sm89"]
    assert sum(kernel.size for kernel in launch.kernels.values()) == len(attributes["cubins"])
    for target in launch.kernels:
        assert launch.cubin(attributes["cubins"], target) == op.compile_cubin(int(target[2:]), "fp16", 32).code


@pytest.mark.slow
def test_same_bytes_in_another_process_without_a_cache(tmp_path):
    code = (
        "import hashlib; from plugins.relu_linear_attention import compile_cubins\n"
        "a = compile_cubins(['sm80', 'sm120'], 'bf16', 32)\n"
        "print(hashlib.sha256(a['launch'] + a['cubins']).hexdigest())"
    )
    here = op.compile_cubins(["sm80", "sm120"], "bf16", 32)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert there.stdout.strip() == hashlib.sha256(here["launch"] + here["cubins"]).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", op.HEAD_DIMS)
def test_plan_agrees_with_the_description(head_dim, dtype):
    """The grid that the plugin computes from the JSON is the plan's."""
    launch = Launch.from_json(op.compile_cubins(["sm89"], dtype, head_dim)["launch"])
    dims = [(3, 5, 77, head_dim)] * 3
    tile = op.plan(batch=3, heads=5, head_dim=head_dim, dtype=dtype)
    assert tuple(evaluate(size, dims) for size in launch.grid) == tile.grid == (15, 1, 1)
    assert launch.kernels["sm89"].warps == tile.num_warps
    *numbers, eps = json.loads(launch.to_json())["args"][4 : 4 + len(op.STRIDES) + 3]
    strides = torch.empty(dims[0]).stride()[:3]
    assert [evaluate(number, dims) for kind, number in numbers if kind == "i32"] == [*strides, *strides, 5, 77]
    assert eps == ["f32", op.EPS]


@pytest.mark.parametrize(
    ("targets", "dtype", "head_dim", "message"),
    [
        (["sm89"], "fp16", 24, r"got head_dim 24; expected one of \(16, 32, 64, 128\)"),
        (["sm89"], "fp16", 256, "got head_dim 256"),
        (["sm89"], "int8", 32, "got dtype 'int8'; expected one of fp16, bf16, fp32"),
        (["sm75"], "fp16", 32, "got target sm75; expected one of sm80"),
    ],
)
def test_bad_arguments(targets, dtype, head_dim, message):
    with pytest.raises(ValueError, match=message):
        op.compile_cubins(targets, dtype, head_dim)


def test_launch_refuses_another_shape():
    q, k, v = qkv((1, 2, 8, 32), "fp16")
    with pytest.raises(ValueError, match="expected one shape, dtype and device"):
        op.launch(q, k, v, torch.empty(1, 8, 2, 32, dtype=torch.float16))
