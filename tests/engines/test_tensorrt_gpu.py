"""Engines of one plugin and one product on the GPU that is there: values, bits, and what is refused."""

import pytest
import torch
from attention_graph import DTYPES, HEAD_DIM, HEADS, attention_model, profiles, qkv, save, with_weight
from parity.bound import assert_parity

from engines import tensorrt
from engines.errors import ArchitectureError, TensorRTVersionError
from engines.spec import Target
from plugins import relu_linear_attention as op
from plugins import shell
from plugins.cubin import CAPABILITIES
from sana_ref import ops

HERE = tensorrt.current_target()
ON_HOPPER = HERE == Target.SM90 and tensorrt.version().startswith("1.6.")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(HERE is None, reason="needs a CUDA GPU")]


def build(path, target):
    options = {"profiles": profiles(), "register_plugins": shell.register}
    return tensorrt.build_engine(path, targets=[target], expected_plugins={op.OP: 1}, **options)


class Runner:
    """An engine over torch tensors: outputs start as NaN."""

    def __init__(self, engine):
        trt, config = tensorrt.load(), engine.create_runtime_config()
        # Else TensorRT for RTX runs a general kernel until a thread has compiled the special one, and the bits depend on when.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self.engine, self.context = engine, engine.create_execution_context(config)
        assert self.context is not None, [str(failure) for failure in shell.failures]
        self.stream = torch.cuda.Stream()

    def bind(self, inputs):
        for name, tensor in inputs.items():
            assert self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.out = torch.full_like(inputs["v"], float("nan"))
        self.context.set_tensor_address("out", self.out.data_ptr())
        torch.cuda.synchronize()

    def __call__(self, inputs):
        self.bind(inputs)
        assert self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        return self.out


@pytest.fixture(scope="module", params=list(DTYPES))
def on_gpu(request, tmp_path_factory):
    """(dtype, weight, runner) of an engine built for the GPU that is there, written to a file and loaded from it."""
    dtype, folder = request.param, tmp_path_factory.mktemp("engine")
    model, weight = with_weight(attention_model(dtype, **op.compile_cubins([HERE], dtype, HEAD_DIM)), dtype)
    engine = folder / "model.engine"
    engine.write_bytes(build(save(model, folder / "model.onnx"), HERE))
    return dtype, weight.cuda(), Runner(tensorrt.deserialize(engine, register_plugins=shell.register))


def feeds(dtype, batch, tokens, seed=0):
    return {n: t.cuda() for n, t in zip("qkv", qkv((batch, HEADS, tokens, HEAD_DIM), dtype, seed=seed), strict=True)}


def reference(inputs, weight, dtype):
    q, k, v = (inputs[name].to(dtype) for name in "qkv")
    return ops.relu_linear_attention_truth(q, k, v @ weight.to(dtype))


GPU_SHAPES = [(4, 1), (2, 63), (1, 64), (3, 65), (1, 1000), (2, 4096)]


@pytest.mark.parametrize(("batch", "tokens"), GPU_SHAPES)
def test_engine_on_gpu(on_gpu, batch, tokens):
    dtype, weight, run = on_gpu
    if dtype == "fp32" and ON_HOPPER:
        pytest.xfail("TensorRT for RTX 1.6 computes fp32 products in TF32 on SM 9.0, whatever the flag says")
    inputs = feeds(dtype, batch, tokens)
    same, exact = reference(inputs, weight, DTYPES[dtype]), reference(inputs, weight, torch.float64)
    assert_parity(run(inputs), same=same, exact=exact, name=f"engine B={batch} N={tokens} {dtype}")


def test_ten_runs_are_bit_equal_and_so_is_a_cuda_graph(on_gpu):
    dtype, _, run = on_gpu
    inputs, others = feeds(dtype, 2, 1000), feeds(dtype, 3, 70, seed=1)
    first = run(inputs).clone()
    for _ in range(10):
        run(others)  # whatever ran before
        assert torch.equal(run(inputs), first)
    run.bind(inputs)
    run.context.execute_async_v3(run.stream.cuda_stream)  # shapes settle before the capture
    run.stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=run.stream):
        assert run.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    for _ in range(10):
        run.out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(run.out, first)


def test_what_an_engine_says_of_itself(on_gpu):
    dtype, _, run = on_gpu
    tensors = {tensor.name: tensor for tensor in tensorrt.engine_tensors(run.engine)}
    kind = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert [(t.name, t.is_input, t.dtype) for t in tensors.values()] == [*((n, True, kind) for n in "qkv"), ("out", False, kind)]
    assert tensors["q"].profile == profiles()["q"]
    assert tensors["out"].shape == (-1, HEADS, -1, HEAD_DIM)
    assert any("attention_0" in str(layer) for layer in tensorrt.engine_layers(run.engine))


def test_a_gpu_without_a_cubin(tmp_path):
    """The engine is for this GPU, its plugin's kernels for others."""
    others = [f"sm{capability}" for capability in CAPABILITIES if f"sm{capability}" != HERE]
    path = save(attention_model("fp16", **op.compile_cubins(others, "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    engine = tensorrt.deserialize(build(path, HERE), register_plugins=shell.register)
    shell.failures.clear()
    context = engine.create_execution_context()
    assert context is None
    assert f"got a GPU of architecture {HERE}; this engine has kernels for" in str(shell.failures[-1])


@pytest.mark.xfail(ON_HOPPER, reason="TensorRT for RTX 1.6 loads it without a word; the manifest's version refuses such a bundle")
def test_an_engine_of_another_tensorrt(tmp_path):
    path = save(attention_model("fp16", **op.compile_cubins([HERE], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    engine = bytearray(build(path, HERE))
    engine[25] = 9
    with pytest.raises(TensorRTVersionError, match=rf"got an engine of TensorRT 1\.9\..*; expected rtx {tensorrt.version()}"):
        tensorrt.deserialize(bytes(engine), register_plugins=shell.register)


@pytest.mark.xfail(ON_HOPPER, reason="TensorRT for RTX 1.6 loads it without a word; the manifest's targets refuse such a bundle")
@pytest.mark.parametrize("target", [t for t in (Target.SM80, Target.SM120) if t != HERE])
def test_an_engine_of_another_architecture(tmp_path, target):
    path = save(attention_model("fp16", **op.compile_cubins([target], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(ArchitectureError, match=f"Build it for {HERE}"):
        tensorrt.deserialize(build(path, target), register_plugins=shell.register)
