"""Building engines without a GPU, and what is said when that cannot be. The tests marked gpu run what was built."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from attention_graph import DTYPES, HEAD_DIM, HEADS, ONNX_TYPES, attention_model, profiles, qkv, save, with_weight
from onnx import helper
from parity.bound import assert_parity

from engines import tensorrt
from engines.errors import ArchitectureError, BuildError, NoGpuError, PluginMissingError, TensorRTVersionError
from engines.spec import AHEAD_OF_TIME_TARGETS, Target
from plugins import relu_linear_attention as op
from plugins import shell
from plugins.cubin import CAPABILITIES
from sana_ref import ops

TARGETS = (Target.SM80, Target.SM86, Target.SM89, Target.SM120)
HERE = tensorrt.current_target()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(HERE is None, reason="needs a CUDA GPU")]
ON_HOPPER = HERE == Target.SM90 and tensorrt.version().startswith("1.6.")
without_gpu = pytest.mark.skipif(HERE is not None, reason="says what happens where there is no GPU")


def build(path, *, targets=TARGETS, expected=1, **options):
    options = {"profiles": profiles(), "register_plugins": shell.register} | options
    return tensorrt.build_engine(path, targets=targets, expected_plugins={op.OP: expected}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_engine_for_four_architectures(tmp_path, dtype):
    """Dynamic batch and tokens; every attention node becomes a plugin; a weight comes out of the external data."""
    model, _ = with_weight(attention_model(dtype, nodes=3, **op.compile_cubins(TARGETS, dtype, HEAD_DIM)), dtype)
    path, engine = save(model, tmp_path / "model.onnx"), io.BytesIO()
    report = tensorrt.build_engine_file(
        path, engine, profiles=profiles(), targets=TARGETS, expected_plugins={op.OP: 3}, register_plugins=shell.register
    )
    assert report.plugins == {op.OP: 3}
    assert report.engine_bytes == len(engine.getvalue()) > 3 * len(op.compile_cubins(TARGETS, dtype, HEAD_DIM)["cubins"])
    assert report.layers >= 4
    assert report.peak_bytes > report.engine_bytes


@pytest.mark.parametrize("target", [t for t in AHEAD_OF_TIME_TARGETS if t != Target.SM80], ids=str)
def test_each_target_that_is_offered(tmp_path, target):
    path = save(attention_model("bf16", **op.compile_cubins([target], "bf16", HEAD_DIM)), tmp_path / "model.onnx")
    assert build(path, targets=[target])


@pytest.mark.parametrize("changes", [{"plugin_namespace": None}, {"plugin_version": "2"}], ids=str)
def test_a_node_that_is_inlined_fails_the_build(tmp_path, changes):
    """TensorRT itself says nothing: it finds no plugin under the domain's name or that version, and takes the function body."""
    attributes = {k: v for k, v in (op.compile_cubins(["sm80"], "fp16", HEAD_DIM) | changes).items() if v is not None}
    path = save(attention_model("fp16", nodes=2, **attributes), tmp_path / "model.onnx")
    with pytest.raises(PluginMissingError, match=r"got the plugin layers none; expected 2 ReluLinearAttention.*plugin_namespace"):
        build(path, expected=2)
    assert build(path, expected=0), "with none expected it is a valid network"


def test_a_plugin_too_many_fails_the_build(tmp_path):
    path = save(attention_model("fp16", nodes=2, **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(PluginMissingError, match="got the plugin layers 2 ReluLinearAttention; expected 3 ReluLinearAttention"):
        build(path, expected=3)


def test_unknown_op(tmp_path):
    model = attention_model("fp16", op_type="NoSuchAttention", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM))
    with pytest.raises(BuildError, match=r"parser refuses:\n  node 'attention_0' \(NoSuchAttention\)"):
        build(save(model, tmp_path / "model.onnx"))


def test_a_node_whose_launch_cannot_be_read(tmp_path, caplog):
    attributes = op.compile_cubins(["sm80"], "fp16", HEAD_DIM) | {"launch": "{}"}
    with pytest.raises(BuildError, match="ReluLinearAttention"):
        build(save(attention_model("fp16", **attributes), tmp_path / "model.onnx"))
    assert "launch description that cannot be read" in str(shell.failures[-1])
    assert "launch description that cannot be read" in caplog.text


@pytest.mark.parametrize(("dtype", "other"), [("fp16", "bf16"), ("bf16", "fp32"), ("fp32", "fp16")])
def test_cubins_of_another_type_do_not_build(tmp_path, dtype, other):
    path = save(attention_model(dtype, **op.compile_cubins(["sm80"], other, HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(BuildError):
        build(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a" * 1000], ids=["empty", "text", "bytes"])
def test_no_onnx(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BuildError, match=r"model\.onnx"):
        build(path)


def test_no_file(tmp_path):
    with pytest.raises(BuildError, match="got no file"):
        build(tmp_path / "model.onnx")


def test_external_data_cut_short(tmp_path):
    model, _ = with_weight(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), "fp16")
    path = save(model, tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(BuildError, match="parser refuses"):
        build(path)


@without_gpu
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((Target.SM90,), r"got sm90; expected some of sm80, .*\(there is none\)\. Build on that GPU with the target 'current'"),
        ((Target.SM80, Target.SM90), "got sm80, sm90"),
        ((), "got none; expected at least one"),
    ],
)
def test_targets_that_cannot_be_built_here(tmp_path, targets, message):
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=message):
        build(path, targets=targets)


SHAPES = profiles()["q"]
BAD_PROFILES = {
    "input without one": ({"q": SHAPES, "k": SHAPES}, "got none for the dynamic inputs v"),
    "unknown input": ({**profiles(), "w": SHAPES}, "got w; expected some of the inputs q, k, v"),
    "opt below min": ({**profiles(), "q": (SHAPES[1], SHAPES[0], SHAPES[2])}, r"input 'q': got \(2, 6, 1024, 32\)"),
    "fixed dimension": ({**profiles(), "q": ((1, 7, 1, 32),) * 3}, r"of the model's \(-1, 6, -1, 32\)"),
    "another rank": ({**profiles(), "q": ((1, 6, 1),) * 3}, "input 'q': got"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD_PROFILES.values(), ids=BAD_PROFILES)
def test_bad_profiles(tmp_path, wrong, message):
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=message):
        build(path, profiles=wrong)


def test_full_disk_comes_through_as_it_is(tmp_path):
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        tensorrt.build_engine_file(
            path, Full(), profiles=profiles(), targets=TARGETS, expected_plugins={op.OP: 1}, register_plugins=shell.register
        )
    assert caught.value.errno == errno.ENOSPC


def test_messages_reach_the_log_and_the_caller(tmp_path, caplog):
    lines = []
    with caplog.at_level(logging.DEBUG, logger="engines"), pytest.raises(BuildError):
        build(save(attention_model("fp16", op_type="Nope"), tmp_path / "model.onnx"), log=lines.append)
    assert any("Nope" in line for line in lines)
    assert any(r.levelno == logging.ERROR and "Nope" in r.message for r in caplog.records)


def test_a_gpu_is_not_missed_while_building(tmp_path, caplog):
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    build(path)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_polygraphy_builds_the_same_network(tmp_path, monkeypatch):
    """An independent builder over the same file: as many layers, and an engine of the same size within 1 %."""
    import polygraphy.config

    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", True)  # what POLYGRAPHY_USE_TENSORRT_RTX=1 sets
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, Profile

    model, _ = with_weight(attention_model("bf16", nodes=2, **op.compile_cubins(TARGETS, "bf16", HEAD_DIM)), "bf16")
    path, ours = save(model, tmp_path / "model.onnx"), io.BytesIO()
    report = tensorrt.build_engine_file(
        path, ours, profiles=profiles(), targets=TARGETS, expected_plugins={op.OP: 2}, register_plugins=shell.register
    )
    profile = Profile()
    for name, shapes in profiles().items():
        profile.add(name, *shapes)
    capabilities = [(int(target[2:-1]), int(target[-1])) for target in TARGETS]
    builder, network, parser = NetworkFromOnnxPath(str(path))()
    assert network.num_layers == report.layers
    config = CreateConfigRTX(profiles=[profile], compute_capabilities=capabilities)
    theirs = EngineBytesFromNetwork((builder, network, parser), config=config)()
    assert memoryview(theirs).nbytes == pytest.approx(report.engine_bytes, rel=0.01)


def test_no_engine_among_these_bytes(tmp_path):
    for name, content in (("garbage", b"garbage" * 100), ("zeros", bytes(4096))):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BuildError, match=rf"{name}: got bytes that are no engine"):
            tensorrt.deserialize(path)
        with pytest.raises(BuildError, match="no engine"):
            tensorrt.deserialize(content)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(BuildError, match="got an empty file"):
        tensorrt.deserialize(empty)


@without_gpu
def test_an_engine_needs_a_gpu(tmp_path):
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(NoGpuError):
        tensorrt.deserialize(build(path), register_plugins=shell.register)


def test_the_version_in_an_engine(tmp_path):
    """Where it stands is not documented: this fails when NVIDIA moves it."""
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    assert tensorrt._built_by(build(path)) == tensorrt.version()
    assert tensorrt._built_by(b"garbage" * 10) == tensorrt._built_by(b"") == ""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=600, check=False
    )


def test_importing_it_is_light():
    heavy = "{'tensorrt_rtx', 'tensorrt', 'cuda.bindings.driver', 'torch', 'onnx', 'triton', 'polygraphy'}"
    done = run_python(f"import sys, engines.tensorrt, plugins.shell; print(*{heavy} & sys.modules.keys())")
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_without_tensorrt():
    code = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name.startswith('tensorrt') else find(name, *rest)\n"
        "from engines import tensorrt\n"
        "from engines.errors import TensorRTVersionError\n"
        "try: tensorrt.load()\n"
        "except TensorRTVersionError as error: print(error)"
    )
    done = run_python(code)
    assert "pip install tensorrt-rtx-cu13" in done.stdout, done.stderr


@pytest.fixture
def bare_libraries(tmp_path):
    """The installed TensorRT libraries as the wheel ships them, without the link: a folder to put first on the path."""
    import tensorrt_rtx_libs

    folder = tmp_path / "site" / "tensorrt_rtx_libs"
    folder.mkdir(parents=True)
    for library in Path(tensorrt_rtx_libs.__path__[0]).glob("*.so.*"):
        (folder / library.name).symlink_to(library)
    (folder / "__init__.py").write_text(
        "import ctypes, pathlib\n"
        "for path in sorted(pathlib.Path(__file__).parent.glob('*.so*'), reverse=True): ctypes.CDLL(str(path))\n"
    )
    return folder


PARSE = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
if {read_only}:
    link = Path.symlink_to
    def refuse(self, target):
        if self.parent.name == "tensorrt_rtx_libs":
            raise PermissionError(13, "Permission denied")
        link(self, target)
    Path.symlink_to = refuse
from engines import tensorrt
from plugins import shell
trt = tensorrt.load()
from engines.tensorrt_library import logger
shell.register(trt)
network = trt.Builder(logger()).create_network(0)
print("parsed", trt.OnnxParser(network, logger()).parse(Path(sys.argv[-1]).read_bytes()), network.num_layers)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the trap is the Linux wheel's")
@pytest.mark.parametrize("read_only", [False, True])
def test_the_link_that_the_parser_needs(tmp_path, bare_libraries, read_only):
    """Without it the process aborts at the first plugin: made beside the library, or in a temporary folder if that is read-only."""
    path = save(attention_model("fp16", **op.compile_cubins(["sm80"], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    code = PARSE.format(read_only=read_only).replace("sys.argv[-1]", repr(str(path)))
    done = run_python(code, PYTHONPATH=os.pathsep.join([str(bare_libraries.parent), *sys.path]))
    assert "parsed True 1" in done.stdout, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert (bare_libraries / "libtensorrt_rtx.so").exists() is not read_only
    assert ("loaded TensorRT through links in" if read_only else "made the link") in done.stdout


# On a GPU


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
    engine.write_bytes(build(save(model, folder / "model.onnx"), targets=[HERE]))
    return dtype, weight.cuda(), Runner(tensorrt.deserialize(engine, register_plugins=shell.register))


def feeds(dtype, batch, tokens, seed=0):
    return {n: t.cuda() for n, t in zip("qkv", qkv((batch, HEADS, tokens, HEAD_DIM), dtype, seed=seed), strict=True)}


def reference(inputs, weight, dtype):
    q, k, v = (inputs[name].to(dtype) for name in "qkv")
    return ops.relu_linear_attention_truth(q, k, v @ weight.to(dtype))


GPU_SHAPES = [(4, 1), (2, 63), (1, 64), (3, 65), (1, 1000), (2, 4096)]


@pytest.mark.parametrize(("batch", "tokens"), [pytest.param(*shape, marks=needs_gpu) for shape in GPU_SHAPES])
def test_engine_on_gpu(on_gpu, batch, tokens):
    dtype, weight, run = on_gpu
    if dtype == "fp32" and ON_HOPPER:
        pytest.xfail("TensorRT for RTX 1.6 computes fp32 products in TF32 on SM 9.0, whatever the flag says")
    inputs = feeds(dtype, batch, tokens)
    same, exact = reference(inputs, weight, DTYPES[dtype]), reference(inputs, weight, torch.float64)
    assert_parity(run(inputs), same=same, exact=exact, name=f"engine B={batch} N={tokens} {dtype}")


@pytest.mark.parametrize("runs", [pytest.param(10, marks=needs_gpu)])
def test_ten_runs_are_bit_equal_and_so_is_a_cuda_graph(on_gpu, runs):
    dtype, _, run = on_gpu
    inputs, others = feeds(dtype, 2, 1000), feeds(dtype, 3, 70, seed=1)
    first = run(inputs).clone()
    for _ in range(runs):
        run(others)  # whatever ran before
        assert torch.equal(run(inputs), first)
    run.bind(inputs)
    run.context.execute_async_v3(run.stream.cuda_stream)  # shapes settle before the capture
    run.stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=run.stream):
        assert run.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    for _ in range(runs):
        run.out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(run.out, first)


@pytest.mark.parametrize("which", [pytest.param("inspection", marks=needs_gpu)])
def test_what_an_engine_says_of_itself(on_gpu, which):
    dtype, _, run = on_gpu
    tensors = {tensor.name: tensor for tensor in tensorrt.engine_tensors(run.engine)}
    kind = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert [(t.name, t.is_input, t.dtype) for t in tensors.values()] == [*((n, True, kind) for n in "qkv"), ("out", False, kind)]
    assert tensors["q"].profile == SHAPES
    assert tensors["out"].shape == (-1, HEADS, -1, HEAD_DIM)
    assert any("attention_0" in str(layer) for layer in tensorrt.engine_layers(run.engine))


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=needs_gpu)])
def test_a_gpu_without_a_cubin(tmp_path, dtype):
    """The engine is for this GPU, its plugin's kernels for others."""
    others = [f"sm{capability}" for capability in CAPABILITIES if f"sm{capability}" != HERE]
    path = save(attention_model(dtype, **op.compile_cubins(others, dtype, HEAD_DIM)), tmp_path / "model.onnx")
    engine = tensorrt.deserialize(build(path, targets=[HERE]), register_plugins=shell.register)
    shell.failures.clear()
    context = engine.create_execution_context()
    assert context is None
    assert f"got a GPU of architecture {HERE}; this engine has kernels for" in str(shell.failures[-1])


@pytest.mark.xfail(ON_HOPPER, reason="TensorRT for RTX 1.6 loads it without a word; the manifest's version refuses such a bundle")
@pytest.mark.parametrize("digit", [pytest.param(9, marks=needs_gpu)])
def test_an_engine_of_another_tensorrt(tmp_path, digit):
    path = save(attention_model("fp16", **op.compile_cubins([HERE], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    engine = bytearray(build(path, targets=[HERE]))
    engine[25] = digit
    with pytest.raises(TensorRTVersionError, match=rf"got an engine of TensorRT 1\.{digit}\..*; expected rtx {tensorrt.version()}"):
        tensorrt.deserialize(bytes(engine), register_plugins=shell.register)


@pytest.mark.xfail(ON_HOPPER, reason="TensorRT for RTX 1.6 loads it without a word; the manifest's targets refuse such a bundle")
@pytest.mark.parametrize("target", [pytest.param(t, marks=needs_gpu) for t in (Target.SM80, Target.SM120) if t != HERE])
def test_an_engine_of_another_architecture(tmp_path, target):
    path = save(attention_model("fp16", **op.compile_cubins([target], "fp16", HEAD_DIM)), tmp_path / "model.onnx")
    with pytest.raises(ArchitectureError, match=f"Build it for {HERE}"):
        tensorrt.deserialize(build(path, targets=[target]), register_plugins=shell.register)


def test_onnx_types_are_those_of_the_checker():
    """The helper writes models that ONNX accepts."""
    for dtype in ONNX_TYPES:
        model, _ = with_weight(attention_model(dtype), dtype)
        onnx.checker.check_model(model, full_check=True)
        assert helper.tensor_dtype_to_np_dtype(ONNX_TYPES[dtype]).itemsize == DTYPES[dtype].itemsize
