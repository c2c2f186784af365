import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from engines.errors import BuildError
from export.onnx_export import Axis, ExportSpec, TensorSpec, export_module, with_function_bodies
from export.plugin_nodes import add_cubins
from sana_ref import conv_ops, tap_ops
from sana_ref.layers import GLUMBConv

SPEC = ExportSpec(
    axes=(Axis(name="n", example=3),),
    inputs=(TensorSpec(name="t", dims=("n",)),),
    outputs=(TensorSpec(name="y", dims=("n", 128)),),
    plugins={},
)


def of_pictures(channels, result, plugins):
    """For a module that takes one picture in fp16, channels last, to one of dimensions `result`."""
    return ExportSpec(
        axes=(Axis(name="h", example=3), Axis(name="w", example=4)),
        inputs=(TensorSpec(name="x", dims=(1, "h", "w", channels), dtype="float16"),),
        outputs=(TensorSpec(name="y", dims=(1, *result), dtype="float16"),),
        plugins=plugins,
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_exponential_of_an_input_is_refused():
    with pytest.raises(BuildError, match="is computed in fp64; expected constants alone to be"):
        export_module(Growing(), SPEC)


class Block(nn.Module):
    """A residual block as an engine has it: channels last, and each convolution's weight transposed from its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1, bias=False)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y = conv_ops.conv3x3(x, self.conv1.weight.permute(0, 2, 3, 1), self.conv1.bias, "silu")
        return conv_ops.conv3x3_norm(y, self.conv2.weight.permute(0, 2, 3, 1), x, self.norm_weight, self.norm_bias, 1e-3)


@pytest.mark.slow
def test_the_mix_ffn_s_filters_are_views_that_tensorrt_s_parser_takes():
    """It refuses a Squeeze of a weight. Small weights hide it: the exporter folds them."""
    spec = of_pictures(256, ("h", "w", 256), {"GatedDepthwiseConv": 1})
    with torch.device("meta"):
        block = GLUMBConv(256, expand_ratio=2.5, norm=False).half()
    block.fused = True

    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block.channels_last(x)

    model = with_function_bodies(export_module(ChannelsLast(), spec))
    found = {node.op_type for node in model.graph}
    assert "Squeeze" not in found
    assert "GatedDepthwiseConv" in found


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(32, 3, 3, 16)), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return conv_ops.conv3x3_upsample(x, self.weight, self.bias, 2)


@pytest.mark.slow
def test_a_convolution_to_more_pixels_is_a_single_node_that_can_have_a_kernel():
    spec = of_pictures(16, ("2*h", "2*w", 8), {"Conv3x3Upsample": 1})
    with torch.device("meta"):
        model = with_function_bodies(export_module(Up().half(), spec))
    proto = ir.serde.serialize_model(model)
    assert add_cubins(proto, ["sm80"]) == 1
    (node,) = proto.graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes["repeats"] == 2
    assert attributes["launch"]
    assert attributes["cubins"]


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_weight, self.norm_bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))
        self.weight, self.bias = nn.Parameter(torch.zeros(16, 27)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return tap_ops.tap_sum(tap_ops.normed_taps(x, self.norm_weight, self.norm_bias, self.weight, 1e-3), self.bias)


@pytest.mark.slow
def test_an_end_of_a_decoder_is_two_nodes_that_can_have_kernels():
    spec = of_pictures(16, ("h", "w", 3), {"NormedTaps": 1, "TapSum": 1})
    with torch.device("meta"):
        model = with_function_bodies(export_module(End().half(), spec))
    proto = ir.serde.serialize_model(model)
    assert add_cubins(proto, ["sm80"]) == 2
    first, second = ({each.name: onnx.helper.get_attribute_value(each) for each in node.attribute} for node in proto.graph.node)
    assert first["eps"] == pytest.approx(1e-3)
    assert second["channels"] == 3
    assert all(each["launch"] and each["cubins"] for each in (first, second))


@pytest.mark.slow
def test_convolutions_are_single_nodes_that_can_have_kernels():
    spec = of_pictures(16, ("h", "w", 16), {"Conv3x3": 1, "Conv3x3Norm": 1})
    with torch.device("meta"):
        model = with_function_bodies(export_module(Block().half(), spec))
    assert [node.op_type for node in model.graph if node.op_type != "Transpose"] == ["Conv3x3", "Conv3x3Norm"]
    proto = ir.serde.serialize_model(model)
    assert add_cubins(proto, ["sm80"]) == 2
    attributes = {
        node.op_type: {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute} for node in proto.graph.node
    }
    assert attributes["Conv3x3"]["activation"] == b"silu"
    assert attributes["Conv3x3Norm"]["eps"] == pytest.approx(1e-3)
    assert all(attributes[op]["launch"] and attributes[op]["cubins"] for op in ("Conv3x3", "Conv3x3Norm"))
