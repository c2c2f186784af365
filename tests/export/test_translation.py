import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.errors import BuildError
from export.onnx_export import Axis, ExportSpec, TensorSpec, export_module

SPEC = ExportSpec(
    axes=(Axis(name="n", example=3),),
    inputs=(TensorSpec(name="t", dims=("n",)),),
    outputs=(TensorSpec(name="y", dims=("n", 128)),),
    plugins={},
)


class Sinusoid(nn.Module):
    """Frequencies as the transformer has them, or as the text encoder has."""

    def __init__(self, power: bool) -> None:
        super().__init__()
        self.power = power

    def forward(self, t: Tensor) -> Tensor:
        i = torch.arange(128, dtype=torch.float32, device=t.device)
        frequencies = 10000.0 ** (-i / 128) if self.power else (-9.210340371976184 * i / 128).exp()
        return (t[:, None] * frequencies).cos()


@pytest.mark.parametrize("power", [False, True], ids=["exp", "power"])
def test_frequencies_are_constants_that_were_rounded_once(power):
    model = export_module(Sinusoid(power), SPEC)
    assert {node.op_type for node in model.graph} == {"Unsqueeze", "Mul", "Cos"}
    found = [v.const_value.numpy().reshape(-1) for v in model.graph.initializers.values() if v.const_value.size == 128]
    i = np.arange(128, dtype=np.float32)
    exponent = np.float64(-i / 128 if power else np.float32(-9.210340371976184) * i / 128)
    exact = 10000.0**exponent if power else np.exp(exponent)
    np.testing.assert_array_equal(found[0], exact.astype(np.float32))


class Growing(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t[:, None].exp().expand(-1, 128)


def test_an_exponential_of_an_input_is_refused():
    with pytest.raises(BuildError, match="is computed in fp64; expected constants alone to be"):
        export_module(Growing(), SPEC)
