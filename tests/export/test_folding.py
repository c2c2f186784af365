"""Weights that a graph computes from parameters are computed once, to the same bits, and what is a view of one stays."""

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from torch import Tensor, nn

from export.folding import fold_weights
from export.onnx_export import Axis, ExportSpec, TensorSpec, export_module
from export.weights import write_weights
from sana_ref.fused_decoder import of_corners

CHANNELS, OUTPUTS = 4, 6
SPEC = ExportSpec(
    axes=(Axis(name="batch", example=3),),
    inputs=(TensorSpec(name="x", dims=("batch", CHANNELS, 5, 5)),),
    outputs=(TensorSpec(name="y", dims=("batch", 4 * OUTPUTS, 5, 5)),),
    plugins={},
)


class Corners(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(OUTPUTS, CHANNELS, 3, 3))
        self.mix = nn.Parameter(torch.empty(CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.mix.dtype).permute(0, 2, 3, 1) @ self.mix.mT).permute(0, 3, 1, 2)
        return F.conv2d(x.float(), of_corners(self.weight).float(), padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_weights_are_stored(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "weight": torch.randn(OUTPUTS, CHANNELS, 3, 3, generator=generator),
        "mix": torch.randn(CHANNELS, CHANNELS, generator=generator),
    }
    with torch.device("meta"):
        model = export_module(Corners().to(dtype), SPEC)
    load = fold_weights(model, weights.__getitem__)
    (stored,) = set(model.graph.initializers) - {"mix"} - {name for name, v in model.graph.initializers.items() if v.const_value}
    assert stored.startswith("weight.")
    assert "weight" not in model.graph.initializers
    assert not {node.op_type for node in model.graph} & {"Split", "Add"}
    assert "Transpose" in {node.op_type for node in model.graph}  # of mix, which TensorRT folds
    expected = of_corners(weights["weight"].to(dtype))
    assert torch.equal(load(stored).to(dtype), expected)

    if dtype is torch.float32:
        write_weights(model, load, tmp_path / "model.data")
        ir.save(model, tmp_path / "model.onnx")
        x = torch.randn(2, CHANNELS, 5, 5, generator=generator)
        (y,) = InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
        wanted = F.conv2d(torch.einsum("oc,bchw->bohw", weights["mix"], x), expected, padding=1)
        torch.testing.assert_close(torch.from_numpy(y), wanted, rtol=1e-5, atol=1e-5)


def test_views_stay():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(OUTPUTS, CHANNELS, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, torch.cat([self.weight] * 4), padding=1)

    with torch.device("meta"):
        model = export_module(Views(), SPEC)
    fold_weights(model, {}.__getitem__)
    assert "weight" in model.graph.initializers
    assert "Concat" in {node.op_type for node in model.graph}
