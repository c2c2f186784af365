"""Products of fp16 tensors must say that they are summed in fp32: on a GPU, TensorRT would sum them in fp16."""

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from export.onnx_export import Axis, ExportSpec, TensorSpec, export_module

SPEC = ExportSpec(
    axes=(Axis(name="batch", example=3),),
    inputs=(TensorSpec(name="x", dims=("batch", 5, 8)),),
    outputs=(TensorSpec(name="y", dims=("batch", 5, 5)),),
    plugins={},
)


class Products(nn.Module):
    """A Linear, whose weight is shared by two products, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.weight.dtype)
        q, k = self.linear(x), self.linear(x + 1)
        return (q @ k.transpose(1, 2)).softmax(-1).float()


def products(dtype: torch.dtype) -> list[ir.Node]:
    with torch.device("meta"):
        model = export_module(Products().to(dtype), SPEC)
    return [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]


@pytest.mark.slow
def test_fp16_products_are_fp32_between_two_casts():
    found = products(torch.float16)
    assert len(found) == 3
    for node in found:
        casts = [value.producer() for value in node.inputs]
        assert [cast.op_type for cast in casts] == ["Cast"] * len(casts)
        assert {cast.inputs[0].dtype for cast in casts} == {ir.DataType.FLOAT16}
        assert {value.dtype for value in (*node.inputs, node.outputs[0])} == {ir.DataType.FLOAT}
        (use,) = node.outputs[0].uses()
        assert (use.node.op_type, use.node.outputs[0].dtype) == ("Cast", ir.DataType.FLOAT16)


class Rows(nn.Module):
    """A Linear of a matrix, which is exported as Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.linear.weight.dtype).flatten(0, 1)).unflatten(0, x.shape[:2]).float()


@pytest.mark.slow
def test_a_bias_is_added_in_fp16():
    """Between the casts, it would make TensorRT keep the weights in fp32."""
    with torch.device("meta"):
        model = export_module(Rows().half(), replace(SPEC, outputs=(TensorSpec(name="y", dims=("batch", 5, 8)),)))
    (product,) = (node for node in model.graph if node.op_type == "Gemm")
    assert len(product.inputs) == 2
    (cast,) = (use.node for use in product.outputs[0].uses())
    (added,) = (use.node for use in cast.outputs[0].uses())
    assert (cast.op_type, added.op_type, added.outputs[0].dtype) == ("Cast", "Add", ir.DataType.FLOAT16)
    assert added.inputs[1].name == "linear.bias"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_precisions_are_left_alone(dtype):
    kind = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float32: ir.DataType.FLOAT}[dtype]
    assert {value.dtype for node in products(dtype) for value in node.inputs} == {kind}
