"""Levels in a decoder's engine: what the nodes compute, in ONNX Runtime, beside what the runtime computes of floats."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.spec import LEVELS, NOT_FINITE
from export.level_nodes import add_levels
from runtime.image import to_levels


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["images"])], "decoder", [given], [images])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    add_levels(model)
    onnx.checker.check_model(model, full_check=True)
    shapes = [[dim.dim_param or dim.dim_value for dim in out.type.tensor_type.shape.dim] for out in model.graph.output]
    assert shapes == [["batch", 3, "height", "width"], ["batch", "height", "width", 3], ["batch"]]
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_levels_are_those_of_the_runtime(session: onnxruntime.InferenceSession) -> None:
    halves = (np.arange(256, dtype=np.float32) + 0.5) / 255 * 2 - 1  # where rounding decides
    beside = np.concatenate([np.nextafter(halves, np.float32(end)) for end in (-2, 2)])
    rest = np.random.default_rng(0).normal(0, 1, 2 * 3 * 40 * 24 - 768).astype(np.float32)
    images = np.concatenate([rest, halves, beside]).reshape(2, 3, 40, 24)
    levels, bad = session.run([LEVELS, NOT_FINITE], {"x": images})
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, to_levels(images))
    assert bad.tolist() == [0, 0]


def test_numbers_that_are_not_finite_are_counted(session: onnxruntime.InferenceSession) -> None:
    images = np.zeros((3, 3, 8, 8), np.float32)
    images[0, 1, 2, 3] = np.nan
    images[2, :, 5, 5] = np.inf, -np.inf, np.nan
    assert session.run([NOT_FINITE], {"x": images})[0].tolist() == [1, 0, 3]
