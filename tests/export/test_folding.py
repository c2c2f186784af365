"""Weights that a graph computes from parameters are computed once, to the same bits; views of parameters stay."""

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from torch import Tensor, nn

from export.folding import FOLDED_NAME, fold_weights
from export.onnx_export import Axis, ExportSpec, TensorSpec, export_module
from export.weights import DATA_NAME, write_weights
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


def exported(folder, dtype):
    """The graph as TensorRT's compiler is told it, and the weights in its type."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "weight": torch.randn(OUTPUTS, CHANNELS, 3, 3, generator=generator),
        "mix": torch.randn(CHANNELS, CHANNELS, generator=generator),
    }
    with torch.device("meta"):
        model = export_module(Corners().to(dtype), SPEC)
    write_weights(model, weights.__getitem__, folder / DATA_NAME)
    return ir.to_proto(model), {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_weights_are_stored(dtype, tmp_path):
    model, weights = exported(tmp_path, dtype)
    assert fold_weights(model, tmp_path) == 1
    ops = {node.op_type for node in model.graph.node}
    assert not ops & {"Split", "Add"}
    assert "Transpose" in ops  # of mix, which TensorRT folds
    (stored,) = (tensor for tensor in model.graph.initializer if [*tensor.dims] == [4 * OUTPUTS, CHANNELS, 3, 3])
    assert "weight" not in {tensor.name for tensor in model.graph.initializer}
    where = {entry.key: entry.value for entry in stored.external_data}
    data = (tmp_path / FOLDED_NAME).read_bytes()[int(where["offset"]) :][: int(where["length"])]
    got = torch.frombuffer(bytearray(data), dtype=torch.float32).view(4 * OUTPUTS, CHANNELS, 3, 3)  # what the convolution reads
    assert torch.equal(got, of_corners(weights["weight"]).float())
    assert {path.name for path in tmp_path.iterdir()} == {DATA_NAME, FOLDED_NAME}


@pytest.mark.slow
def test_the_graph_computes_the_same(tmp_path):
    model, _ = exported(tmp_path, torch.float32)  # ONNX Runtime multiplies no bf16 on a CPU
    x = torch.randn(2, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(1)).numpy()
    found = []
    for folded in (False, True):
        assert not folded or fold_weights(model, tmp_path)
        onnx.save(model, tmp_path / "model.onnx")
        found.append(InferenceSession(tmp_path / "model.onnx").run(None, {"x": x})[0])
    assert (found[0] == found[1]).all()


@pytest.mark.slow
def test_views_stay(tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(OUTPUTS, CHANNELS, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, torch.cat([self.weight] * 4), padding=1)

    with torch.device("meta"):
        model = export_module(Views(), SPEC)
    proto = ir.to_proto(model)
    assert fold_weights(proto, tmp_path) == 0
    assert "Concat" in {node.op_type for node in proto.graph.node}
    assert not any(tmp_path.iterdir())
