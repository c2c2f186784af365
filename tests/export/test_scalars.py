from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from export.onnx_export import Axis, ExportSpec, TensorSpec, export_module
from export.widen import widened

SPEC = ExportSpec(
    axes=(Axis(name="n", example=3),),
    inputs=(TensorSpec(name="x", dims=("n", 4)),),
    outputs=(TensorSpec(name="y", dims=("n", 4)),),
    plugins={},
)


class Scaled(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype) * self.weight
        return ((self.number - x) / self.number).float()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "casts"), [(2.0, 2), (19.6, 6)])
def test_only_numbers_that_16_bits_do_not_hold_are_widened(number, casts):
    with torch.device("meta"):
        module = Scaled(number).to(torch.bfloat16)
    model = export_module(module, SPEC)
    assert Counter(node.op_type for node in model.graph) == {"Cast": casts, "Mul": 1, "Sub": 1, "Div": 1}
    constants = [float(v.const_value.numpy()) for v in widened(model).graph.initializers.values() if v.const_value is not None]
    assert constants == [pytest.approx(number, rel=1e-7)]
