"""What a decoder's engine gives beside its images: their levels of 8 bits, as they lie in a picture, and how many are no numbers.

A picture then leaves the GPU as a quarter of the bytes, and no processor makes levels of floats. The levels are those of
runtime.image.to_levels, to the bit.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.spec import LEVELS, NOT_FINITE

__all__ = ["add_levels"]


def add_levels(model: onnx.ModelProto) -> None:
    """Two outputs more, in place, of the first, images (B, 3, H, W): LEVELS (B, H, W, 3) uint8, and NOT_FINITE (B,) int32."""
    graph = model.graph
    images = graph.output[0]
    batch, channels, height, width = images.type.tensor_type.shape.dim
    constants = {
        "levels_least": np.float32(-1),
        "levels_most": np.float32(1),
        "levels_half": np.float32(127.5),  # (x + 1) 127.5 is (x / 2 + 1/2) 255 to the bit: halving rounds nothing
        "levels_columns": np.array([3]),
        "levels_rows": np.array([1, 2]),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    graph.node.extend(
        [
            helper.make_node("Transpose", [images.name], ["levels_last"], perm=[0, 2, 3, 1]),
            helper.make_node("Clip", ["levels_last", "levels_least", "levels_most"], ["levels_clipped"]),
            helper.make_node("Add", ["levels_clipped", "levels_most"], ["levels_above"]),
            helper.make_node("Mul", ["levels_above", "levels_half"], ["levels_scaled"]),
            helper.make_node("Round", ["levels_scaled"], ["levels_rounded"]),
            helper.make_node("Cast", ["levels_rounded"], [LEVELS], to=TensorProto.UINT8),
            helper.make_node("IsNaN", [images.name], ["levels_nan"]),
            helper.make_node("IsInf", [images.name], ["levels_inf"]),
            helper.make_node("Or", ["levels_nan", "levels_inf"], ["levels_bad"]),
            helper.make_node("Cast", ["levels_bad"], ["levels_count"], to=TensorProto.INT32),
            # By rows first: of one sum, a kernel may have one block for all of a picture.
            helper.make_node("ReduceSum", ["levels_count", "levels_columns"], ["levels_by_row"], keepdims=0),
            helper.make_node("ReduceSum", ["levels_by_row", "levels_rows"], [NOT_FINITE], keepdims=0),
        ]
    )
    for name, kind, dims in (
        (LEVELS, TensorProto.UINT8, (batch, height, width, channels)),
        (NOT_FINITE, TensorProto.INT32, (batch,)),
    ):
        value = helper.make_tensor_value_info(name, kind, [None] * len(dims))
        for made, dim in zip(value.type.tensor_type.shape.dim, dims, strict=True):
            made.CopyFrom(dim)
        graph.output.append(value)
