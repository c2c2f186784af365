"""Portable graphs in ONNX Runtime: what the CPU that is there must not change."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime import ort_session
from runtime.ort_session import OrtSession

ROWS, DEPTH, COLUMNS = 4, 64, 8


@pytest.fixture
def graph(tmp_path):
    """A product of quantized numbers with scales 1, as export/qdq_nodes.py writes them."""
    numbers = np.full((COLUMNS, DEPTH), 127, np.int8)
    numbers[1::2] = -127
    initializers = {
        "weight": numbers,
        "scales": np.ones(COLUMNS, np.float32),
        "scale": np.float32(1),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["wide"]),
        helper.make_node("DequantizeLinear", ["weight", "scales"], ["wide_weight"], axis=0),
        helper.make_node("Transpose", ["wide_weight"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["wide", "columns"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", COLUMNS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    path = tmp_path / "product.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path, numbers


def test_sums_of_int8_are_not_cut_off(graph):
    """The largest numbers there are: two products of theirs are no 16-bit number."""
    path, numbers = graph
    x = np.full((ROWS, DEPTH), 127, np.float32)
    x[1::2, ::3] = 5
    (y,) = OrtSession(path).run({"x": x}).values()
    np.testing.assert_array_equal(y, x @ numbers.T.astype(np.float32))


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "flags\t\t: sse4_2 avx2 avx512f avx512_vnni\n", True),
        ("AMD64", "flags\t\t: avx2 avx_vnni", True),
        ("x86_64", "flags\t\t: avx2 avx512f\nbugs\t\t: avx512_vnni\n", False),
        ("x86_64", None, False),
        ("aarch64", None, True),
    ],
)
def test_which_cpus_add_in_32_bits(monkeypatch, tmp_path, machine, flags, exact):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + flags)
    monkeypatch.setattr(ort_session, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(ort_session.platform, "machine", lambda: machine)
    assert ort_session._adds_in_32_bits.__wrapped__() is exact
