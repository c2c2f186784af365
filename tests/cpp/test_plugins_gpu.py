"""Both plugin shells on a GPU: the same engine gives the same bits with either, and what a launch costs through each.

Run with TENSORRT_ROOT set, or with a library that was built elsewhere in SANA_PLUGINS_LIBRARY. The figures are printed: pytest -s.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cpp_build
import pytest

from engines import tensorrt
from plugins import native

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(tensorrt.current_target() is None, reason="needs a CUDA GPU"),
]

# Builds the engine where there is none yet; runs it; prints a digest of what came out and the host's time for a launch.
RUN = """
import hashlib, json, sys, time
from pathlib import Path
import torch
from attention_graph import HEAD_DIM, HEADS, attention_model, profiles, qkv, save
from engines import tensorrt
from plugins import relu_linear_attention as op, shell
path, nodes = Path(sys.argv[1]), 32
if not path.exists():
    here = tensorrt.current_target()
    model = attention_model("fp16", nodes=nodes, **op.compile_cubins([here], "fp16", HEAD_DIM))
    path.write_bytes(tensorrt.build_engine(
        save(model, path.with_suffix(".onnx")), profiles=profiles(), targets=[here], expected_plugins={op.OP: nodes},
        register_plugins=shell.register,
    ))
engine = tensorrt.deserialize(path, register_plugins=shell.register)
trt, config = tensorrt.load(), engine.create_runtime_config()
if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
context, stream = engine.create_execution_context(config), torch.cuda.Stream()
tensors = {n: t.cuda() for n, t in zip("qkv", qkv((2, HEADS, 1024, HEAD_DIM), "fp16", scale=0.1), strict=True)}
tensors["out"] = torch.full_like(tensors["v"], float("nan"))
for name, tensor in tensors.items():
    assert name == "out" or context.set_input_shape(name, tuple(tensor.shape))
    context.set_tensor_address(name, tensor.data_ptr())
torch.cuda.synchronize()
times = []
for _ in range(50):
    began = time.perf_counter()
    assert context.execute_async_v3(stream.cuda_stream)
    times.append(time.perf_counter() - began)
    stream.synchronize()
out = tensors["out"].cpu()
assert out.isfinite().all()
print(json.dumps({"digest": hashlib.sha256(out.numpy().tobytes()).hexdigest(), "us": sorted(times)[25] / nodes * 1e6}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if built := os.environ.get("SANA_PLUGINS_LIBRARY"):
        return Path(built)
    if not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("set TENSORRT_ROOT to an SDK, or SANA_PLUGINS_LIBRARY to a libsana_plugins.so that was built elsewhere")
    return cpp_build.build(tmp_path_factory.mktemp("plugins"), source=REPOSITORY / "plugins" / "cpp") / "libsana_plugins.so"


def run(engine: Path, shell_used: str) -> dict[str, object]:
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {native.VARIABLE: shell_used, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", RUN, engine], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("builder", ["python", "cpp"])
def test_either_runs_what_either_built(library, tmp_path, builder):
    """Bit for bit; and the shell in C++ is the quicker one."""
    engine, shells = tmp_path / "model.engine", {"python": native.PYTHON, "cpp": str(library)}
    run(engine, shells[builder])
    found = {name: run(engine, used) for name, used in shells.items()}
    print(f"\nhost time for one of 32 launches, built by {builder}: { ({name: each['us'] for name, each in found.items()}) } us")
    assert found["python"]["digest"] == found["cpp"]["digest"]
    assert found["cpp"]["us"] < found["python"]["us"]
