"""What TensorRT says that an engine needs, and what keeps products of narrow weights from a scratch of their own each."""

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines import tensorrt
from engines.spec import Target

pytest.importorskip("tensorrt_rtx")
SIDE, TOKENS, SCRATCH = 512, 600, 8 << 20


def products(path: Path, number: int) -> Path:
    """`number` products of x (n, SIDE) bf16 with int8 weights, a scale a row."""
    generator = np.random.default_rng(0)
    nodes, tensors = [], []
    for i in range(number):
        numbers = generator.integers(-127, 128, (SIDE, SIDE)).astype(np.int8)
        tensors.append(helper.make_tensor(f"q{i}", TensorProto.INT8, numbers.shape, numbers.tobytes(), raw=True))
        tensors.append(
            helper.make_tensor(f"s{i}", TensorProto.BFLOAT16, [SIDE], np.full(SIDE, 0x3C00, np.uint16).tobytes(), raw=True)
        )
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}"], [f"w{i}"], axis=0))
        nodes.append(helper.make_node("Transpose", [f"w{i}"], [f"t{i}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", f"t{i}"], [f"y{i}"]))
    given = [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", SIDE])]
    made = [helper.make_tensor_value_info(f"y{i}", TensorProto.BFLOAT16, ["n", SIDE]) for i in range(number)]
    graph = helper.make_graph(nodes, "products", given, made, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def memory(path: Path, aux_streams: int | None) -> dict[str, int]:
    shapes = {"x": ((1, SIDE), (TOKENS, SIDE), (TOKENS, SIDE))}
    report = tensorrt.build_engine_file(
        path, io.BytesIO(), profiles=shapes, targets=(Target.SM120,), expected_plugins={}, aux_streams=aux_streams
    )
    return report.memory


@pytest.mark.slow
def test_on_one_stream_products_share_their_scratch(tmp_path):
    """The other way round shows what for: a TensorRT that shares it on several streams too would need no such option."""
    path = products(tmp_path / "products.onnx", 6)
    shared, apart = memory(path, 0), memory(path, None)
    assert 6 * SIDE * SIDE <= shared["Weights"] < 1.01 * 6 * SIDE * SIDE  # int8: a byte each
    assert 0 < shared["Activation"] <= SCRATCH
    assert apart["Activation"] > 2 * SCRATCH


def test_what_is_said_is_of_the_last_engine(tmp_path):
    large = memory(products(tmp_path / "large.onnx", 4), 0)
    small = memory(products(tmp_path / "small.onnx", 1), 0)
    assert small["Weights"] < large["Weights"] / 3
