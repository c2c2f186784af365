"""The plugin shell in C++ beside that in Python: engines that either builds, and what either tells CUDA, are the same bytes."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cpp_build
import pytest

from plugins import native, work
from plugins.launch import Kernel, Launch, LaunchError, Output, Product, evaluate

REPOSITORY = Path(__file__).parents[2]
BUILD_WITH = """
import sys
from pathlib import Path
from attention_graph import HEAD_DIM, attention_model, profiles, save
from engines import tensorrt
from engines.spec import Target
from plugins import relu_linear_attention as op, shell
out, launch = Path(sys.argv[1]), sys.argv[2]
attributes = op.compile_cubins(["sm80", "sm86"], "fp16", HEAD_DIM) | ({"launch": launch} if launch else {})
engine = tensorrt.build_engine(
    save(attention_model("fp16", nodes=2, **attributes), out / "model.onnx"), profiles=profiles(),
    targets=[Target.SM80, Target.SM86], expected_plugins={op.OP: 2}, register_plugins=shell.register,
)
(out / "engine").write_bytes(engine)
"""


@pytest.fixture(scope="session")
def plugins(tmp_path_factory) -> Path:
    """The folder with the plugins' library; skips without TensorRT's headers."""
    if not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("needs TensorRT's headers: set TENSORRT_ROOT to the folder of a TensorRT or TensorRT for RTX SDK")
    folder = Path(os.environ.get("SANA_PLUGINS_BUILD") or tmp_path_factory.mktemp("plugins"))
    return cpp_build.build(folder, source=REPOSITORY / "plugins" / "cpp")


def build_with(shell_used: str, out: Path, launch: str = "") -> subprocess.CompletedProcess[str]:
    out.mkdir()
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    environment = os.environ | {native.VARIABLE: shell_used, "PYTHONPATH": paths}
    command = [sys.executable, "-c", BUILD_WITH, out, launch]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_same_engine(plugins, tmp_path):
    """Byte for byte: types, formats, shapes, workspace and serialised fields are the same.

    TensorRT numbers its tensors in one of two ways, by chance: of a dozen engines that one shell built, three differed from the
    others in twenty bytes. So each shell builds until an engine is one of the other's.
    """
    engines: dict[str, set[bytes]] = {"python": set(), "cpp": set()}
    for attempt in range(6):
        for name, used in (("python", native.PYTHON), ("cpp", str(plugins / "libsana_plugins.so"))):
            out = tmp_path / f"{name}{attempt}"
            done = build_with(used, out)
            assert done.returncode == 0, done.stderr
            engines[name].add((out / "engine").read_bytes())
        if engines["python"] & engines["cpp"]:
            return
    raise AssertionError(
        f"got engines of {[{len(each) for each in found} for found in engines.values()]} bytes; expected one in common"
    )


@pytest.mark.slow
def test_tensorrt_logs_what_went_wrong(plugins, tmp_path):
    done = build_with(str(plugins / "libsana_plugins.so"), tmp_path / "out", "{}")
    assert done.returncode
    assert "launch description that cannot be read" in done.stderr


@pytest.mark.slow
def test_a_library_that_is_not_there(tmp_path):
    done = build_with(str(tmp_path / "libsana_plugins.so"), tmp_path / "out")
    assert done.returncode
    assert "libsana_plugins.so: TensorRT cannot load the plugins" in done.stderr


def kernels() -> tuple[dict[str, Kernel], bytes]:
    found, cubins = {}, b""
    for sm, cubin, warps, shared in (("sm80", b"for 80", 4, 49152), ("sm89", b"for 89!", 8, 65536)):
        digest = hashlib.sha256(cubin).hexdigest()
        found[sm] = Kernel(entry="run", warps=warps, shared=shared, offset=len(cubins), size=len(cubin), sha256=digest)
        cubins += cubin
    return found, cubins


LAUNCH = Launch(
    op="Linear",
    inputs=["fp16", "fp16"],
    outputs=[Output(type="fp16", shape=[["dim", 0, 0], ["ceildiv", ["dim", 0, 1], 2]])],
    grid=[["mul", ["dim", 0, 0], 2], ["max", ["dim", 1, 0], 1], ["floordiv", ["dim", 0, 1], 3]],
    args=[["in", 1], ["out", 0], ["in", 0], ["i32", ["sub", ["dim", 0, 1], 10]], ["i32", ["ceildiv", ["sub", 0, ["dim", 0, 1]], 2]],
          ["f32", 1e-15], ["f32", 3], ["null"]],
    kernels=kernels()[0],
)  # fmt: skip


def live(plugins, tmp_path, launch: bytes, *shapes: tuple[int, ...], sm="89", cubins=None, **environment: str) -> list[str]:
    """What the fake CUDA driver and TensorRT's logger were told, line by line."""
    (tmp_path / "launch").write_bytes(launch)
    (tmp_path / "cubins").write_bytes(kernels()[1] if cubins is None else cubins)
    sizes = [",".join(map(str, shape)) for shape in shapes]
    command = [plugins / "plugin_check", tmp_path / "launch", tmp_path / "cubins", "1", *sizes]
    fake = {"LD_LIBRARY_PATH": str(plugins / "fake"), "FAKE_CUDA_SM": sm, "FAKE_CUDA_ARGS": str(len(LAUNCH.args))} | environment
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | fake, check=True).stdout.splitlines()


LAUNCH_WITH = """
import sys
from pathlib import Path
from plugins.launch import Launch
from plugins.work import KernelWork
launch, cubins = (Path(path).read_bytes() for path in sys.argv[1:3])
work = KernelWork(Launch.from_json(launch), cubins)
work.prepare([tuple(map(int, shape.split(","))) for shape in sys.argv[3:]])
work.queue([4096, 8192], [65536], 0, 7)
"""


@pytest.mark.parametrize(("sm", "shapes"), [("89", ((3, 9), (5,))), ("80", ((1, 4096), (7,))), ("89", ((2, 11), (1,)))])
def test_the_same_launch(plugins, tmp_path, sm, shapes):
    """All that both shells tell the driver, Python's through cuda.bindings."""
    lines = live(plugins, tmp_path, LAUNCH.to_json(), *shapes, sm=sm)
    python = [sys.executable, "-c", LAUNCH_WITH, tmp_path / "launch", tmp_path / "cubins"]
    fake = {"LD_LIBRARY_PATH": str(plugins / "fake"), "FAKE_CUDA_SM": sm, "FAKE_CUDA_ARGS": str(len(LAUNCH.args))}
    environment = os.environ | fake | {"PYTHONPATH": str(REPOSITORY)}
    command = [*python, *(",".join(map(str, shape)) for shape in shapes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    dims = list(shapes)
    arguments = work.Arguments(LAUNCH)
    arguments.set_shapes(dims)
    arguments.set_addresses([4096, 8192], [65536])
    grid = [evaluate(each, dims) for each in LAUNCH.grid]
    kernel = LAUNCH.kernels[f"sm{sm}"]
    numbers = [*grid, 32 * kernel.warps, 1, 1, kernel.shared, 1, 1, 1]
    expected = " ".join(["launch", *map(str, numbers), *(f"{value:016x}" for value in arguments._values)])
    fields = [f"field launch {LAUNCH.to_json().hex()}", f"field cubins {kernels()[1].hex()}"]
    asked = ["attribute 8 65536"] if sm == "89" else []
    told = [
        f"load {LAUNCH.cubin(kernels()[1], f'sm{sm}')[:6].decode()}",
        "function run",
        *asked,
        expected,
    ]
    assert done.stdout.splitlines() == told
    assert lines == [*fields, *told, "enqueue 0"]


def test_an_empty_tensor_launches_nothing(plugins, tmp_path):
    assert live(plugins, tmp_path, LAUNCH.to_json(), (0, 9), (5,))[-1] == "enqueue 0"
    assert not [line for line in live(plugins, tmp_path, LAUNCH.to_json(), (0, 9), (5,)) if line.startswith("launch")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sm": "87"},
            "Linear: got a GPU of architecture sm87; this engine has kernels for sm80, sm89. Build it again with sm87 among",
        ),
        ({"cubins": b"for 80for 88!"}, "Linear, sm89: the cubin's SHA-256 is not"),
        ({"FAKE_CUDA_NO_CONTEXT": "1"}, "Linear: no CUDA context is current in this thread; expected TensorRT to have made one"),
        (
            {"FAKE_CUDA_FAILS": "1"},
            "Linear: cuLaunchKernel, grid (6, 5, 3), 256 threads, 65536 bytes shared: got CUDA_ERROR_OF_SOME",
        ),
    ],
    ids=str,
)
def test_what_goes_wrong(plugins, tmp_path, options, message):
    lines = live(plugins, tmp_path, LAUNCH.to_json(), (3, 9), (5,), **options)
    assert [line for line in lines if line.startswith(f"error {message}")], lines


@pytest.mark.parametrize("shapes", [((3,), (5,)), ((1, 2**31 + 10), (1,)), ((2**31, 9), (5,))], ids=str)
def test_shapes_that_do_not_fit(plugins, tmp_path, shapes):
    lines = live(plugins, tmp_path, LAUNCH.to_json(), *shapes)
    assert lines[-1].startswith(("error got shapes", "error Linear: got shapes")), lines


def changed(**changes: object) -> bytes:
    return json.dumps(json.loads(LAUNCH.to_json()) | changes, separators=(",", ":")).encode()


PRODUCT = {"rows": 1, "columns": 1, "depth": 1}
SM80 = dataclasses.asdict(LAUNCH.kernels["sm80"])
BAD = {
    "format": changed(format=3),
    "type": changed(inputs=["fp17", "fp16"]),
    "grid": changed(grid=[1, 1]),
    "input": changed(grid=[["dim", 2, 0], 1, 1]),
    "operation": changed(grid=[["pow", 1, 2], 1, 1]),
    "bool": changed(grid=[True, 1, 1]),
    "argument": changed(args=[["in", 2]]),
    "number": changed(args=[["f32", "1"]]),
    "unknown": changed(more=1),
    "product": changed(product=PRODUCT),
    "warps": changed(kernels={"sm80": SM80 | {"warps": 33}}),
    "warps unsaid": changed(kernels={"sm80": {name: value for name, value in SM80.items() if name != "warps"}}),
    "list": b'{"op":"Linear","format":2}',
    "text": b'"op":"Linear"',
}


@pytest.mark.parametrize("launch", BAD.values(), ids=BAD)
def test_both_refuse(plugins, tmp_path, launch):
    with pytest.raises(LaunchError):
        Launch.from_json(launch)
    lines = live(plugins, tmp_path, launch)
    assert len(lines) == 1, "an error, and no plugin"
    assert lines[0].startswith("error ")


def test_products_need_cublas(plugins, tmp_path):
    launch = dataclasses.replace(
        LAUNCH, outputs=[Output(type="fp16", shape=[1, 1])], kernels={}, args=[], product=Product(rows=1, columns=1, depth=1)
    )
    lines = live(plugins, tmp_path, launch.to_json(), (1, 1), (1, 1), SANA_CUBLASLT="/nowhere/libcublasLt.so.13")
    assert lines[1] == "field cubins 00", "TensorRT drops an empty field"
    assert lines[-1].startswith("error got no cuBLASLt (/nowhere/libcublasLt.so.13: cannot open")


PRODUCT_WITH = """
import os
from plugins import cublas_lt
cublas_lt.paths = lambda: [os.environ["SANA_CUBLASLT"]]
product = cublas_lt.Product("fp8", bias=True, context_id=1)
product.prepare(2048, 2240, 5600)
product.run(4096, 8192, 20480, 65536, 0, 7, x_scale=12288, w_scale=16384)
"""


@pytest.mark.parametrize(
    ("answers", "taken"),
    [
        ({"FAKE_LT_3": "9:2.18:0", "FAKE_LT_0": "1:1.9:0 2:0.97:0 3:1.1:0"}, [1]),
        ({"FAKE_LT_3": "9:2.18:0", "FAKE_LT_0": "1:1.9:0 2:0.97:0", "FAKE_LT_CHECK": " 1 "}, [2]),
        ({"FAKE_LT_3": "9:2.18:0", "FAKE_LT_0": "1:1.9:4096 2:0.97:67108864", "FAKE_LT_CHECK": " 3 "}, [9]),
        ({"FAKE_LT_3": "9:2.18:0", "FAKE_LT_0": "1:1.9:0 2:0.97:0", "FAKE_LT_REFUSES": " 1 2 "}, [1, 2, 9]),
        ({"FAKE_LT_3": "9:10.7:0 8:2.1:0", "FAKE_LT_0": "1:1.0:0"}, [9]),
        ({"FAKE_LT_3": "9:0:0", "FAKE_LT_0": "1:1.0:0"}, [9]),
    ],
    ids=["first that fills its waves", "does not run so", "workspace", "refused", "own fills its waves", "not said"],
)
def test_the_same_product(plugins, tmp_path, answers, taken):
    """In FP8: the same algorithm, and all that cuBLASLt is told."""
    shapes = [(2048, 5600), (2240, 5600), (2048,), (2240,), (2240,)]
    sizes = Product(rows=["dim", 0, 0], columns=["dim", 1, 0], depth=["dim", 0, 1])
    launch = Launch(
        op="Fp8Linear",
        inputs=["int8", "int8", "fp32", "fp32", "fp16"],
        outputs=[Output(type="fp16", shape=[["dim", 0, 0], ["dim", 1, 0]])],
        grid=[1, 1, 1],
        args=[],
        kernels={},
        product=sizes,
    )
    library = {"SANA_CUBLASLT": str(plugins / "fake" / "libfake_cublaslt.so")} | answers
    lines = live(plugins, tmp_path, launch.to_json(), *shapes, **library)
    python = [sys.executable, "-c", PRODUCT_WITH]
    environment = os.environ | library | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(python, capture_output=True, text=True, env=environment, check=True)
    assert [line for line in lines if not line.startswith("field ")] == [*done.stdout.splitlines(), "enqueue 0"]
    assert [int(line.split(" by ")[1].split(",")[0]) for line in lines if line.startswith("multiply")] == taken


def test_which_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv(native.VARIABLE, native.PYTHON)
    assert native.library_path() is None
    monkeypatch.setenv(native.VARIABLE, "/nowhere/lib.so")
    assert native.library_path() == Path("/nowhere/lib.so")
    monkeypatch.delenv(native.VARIABLE)
    monkeypatch.setattr(native, "_BESIDE", tmp_path / "libsana_plugins.so")
    assert native.library_path() is None
    (tmp_path / "libsana_plugins.so").touch()
    assert native.library_path() == tmp_path / "libsana_plugins.so"


def test_a_library_that_an_op_runs_with_can_be_opened_before(plugins, tmp_path):
    """As libsana_runtime does while CUDA's context is made; what is no cuBLASLt is said by the node that needs it, not here."""
    other = tmp_path / "other.so"
    shutil.copy(plugins / "fake" / "libcuda.so.1", other)
    program = f"""
import ctypes
from pathlib import Path
library = ctypes.CDLL({str(plugins / "libsana_plugins.so")!r})
for op in (b"Conv3x3", b"Linear", b"Linear"):
    library.sana_plugins_open_library_of(op)
    print({str(other)!r} in Path("/proc/self/maps").read_text())
"""
    environment = os.environ | {"SANA_CUBLASLT": str(other)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
