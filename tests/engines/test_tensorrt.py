"""Building engines without a GPU, and what is said when that cannot be. test_tensorrt_gpu.py runs such engines."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from attention_graph import DTYPES, HEAD_DIM, ONNX_TYPES, attention_model, profiles, save, with_weight
from onnx import helper

from engines import tensorrt
from engines.errors import BuildError, NoGpuError, PluginMissingError
from engines.spec import AHEAD_OF_TIME_TARGETS, Target
from plugins import relu_linear_attention as op
from plugins import shell

TARGETS = (Target.SM80, Target.SM86, Target.SM89, Target.SM120)
HERE = tensorrt.current_target()
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


@pytest.mark.slow
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


def test_onnx_types_are_those_of_the_checker():
    """The helper writes models that ONNX accepts."""
    for dtype in ONNX_TYPES:
        model, _ = with_weight(attention_model(dtype), dtype)
        onnx.checker.check_model(model, full_check=True)
        assert helper.tensor_dtype_to_np_dtype(ONNX_TYPES[dtype]).itemsize == DTYPES[dtype].itemsize
