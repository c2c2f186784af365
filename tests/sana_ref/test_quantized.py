"""A quantised transformer in PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from engines.errors import CheckpointError, SpecError
from sana_ref.quantization import (
    LayerPlan,
    QuantizationPlan,
    group_of,
    groups_of,
    load_plan,
    part_of,
    plan_digest,
    prefix_of,
    save_plan,
)
from sana_ref.quantize_ops import NVFP4_RANGE, quantize_weight, round_dynamic, round_nvfp4, round_static
from sana_ref.quantized import InputRanges, QuantizedLinears, quantize_layer, static_scale, uniform_plan
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig, fuse

KINDS = ("int8", "fp8", "nvfp4")
QKV, OUT, UP = (f"transformer_blocks.0.{name}" for name in ("attn1.to_qkv", "attn1.to_out.0", "ff.conv_inverted"))


def model():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    config = SanaTransformerConfig(
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=8, sample_size=8, **sizes
    )
    return SanaTransformer2DModel(config).eval().requires_grad_(False)


def groups(transformer):
    return groups_of(name for name, _ in transformer.named_parameters())


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 5, 3), torch.randn(2, 7, 8), torch.tensor([500.0, 20.0])


def ranges(transformer):
    with InputRanges(transformer) as found:
        transformer(*inputs())
    return found.largest()


def plan_of(transformer, kind):
    """With everything that a plan can have."""
    plan = uniform_plan(kind, groups(transformer), {group: static_scale(kind, most) for group, most in ranges(transformer).items()})
    parameters = dict(transformer.named_parameters())
    for group, names in groups(transformer).items():
        columns, depth = sum(parameters[name].shape[0] for name in names), parameters[names[0]].shape[1]
        plan.tensors[f"{group}.smooth"] = torch.rand(depth) + 0.5
        plan.tensors[f"{group}.low_rank_down"] = torch.randn(2, depth) * 0.05
        plan.tensors[f"{group}.low_rank_up"] = torch.randn(columns, 2)
    return plan


def test_groups():
    found = groups(model())
    assert len(found) == 2 * 6
    assert found[QKV] == [f"transformer_blocks.0.attn1.to_{name}.weight" for name in "qkv"]
    assert found[UP] == [f"{UP}.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_plain_are_the_same(kind):
    """q, k and v as one product or as three, 1x1 convolutions or products: the same numbers are rounded the same way."""
    plain = model()
    plan = plan_of(plain, kind)
    fused = copy.deepcopy(plain)
    fuse(fused)
    exact = plain(*inputs())
    with QuantizedLinears(plain, plan):
        wanted = plain(*inputs())
    with QuantizedLinears(fused, plan):
        got = fused(*inputs())
    quantized = (wanted - exact).norm()
    assert 1e-3 < quantized / exact.norm() < 0.5
    assert (got - wanted).norm() < 0.1 * quantized  # what fp32 sums in another order, and the roundings that they tip, may do
    assert torch.equal(plain(*inputs()), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_groups_alone(kind):
    transformer = model()
    scale = static_scale(kind, ranges(transformer)[OUT])
    plan = QuantizationPlan(layers={OUT: LayerPlan(format=kind, input_scale=scale), QKV: LayerPlan(format="none")})
    module = transformer.transformer_blocks[0].attn1.to_out[0]
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3))
    with QuantizedLinears(transformer, plan):
        got, other = module(x), transformer.transformer_blocks[1].attn1.to_out[0](x)
        q = transformer.transformer_blocks[0].attn1.to_q(x)
    rounded = round_nvfp4(x, scale) if kind == "nvfp4" else round_static(x, kind, scale)
    wanted = F.linear(rounded, quantize_weight(module.weight, kind, "w").real()) + module.bias
    assert torch.equal(got, wanted)
    assert torch.equal(other, transformer.transformer_blocks[1].attn1.to_out[0](x))
    assert torch.equal(q, transformer.transformer_blocks[0].attn1.to_q(x))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_scale_a_token(kind):
    transformer = model()
    module = transformer.transformer_blocks[0].attn1.to_out[0]
    x = torch.randn(3, 5, 32).half()
    with QuantizedLinears(transformer.half(), uniform_plan(kind, groups(transformer))):
        got = module(x)
    wide = F.linear(round_dynamic(x.float(), kind), quantize_weight(module.weight, kind, "w").real()) + module.bias.float()
    assert torch.equal(got, wide.half())


def test_corrections_cost_nothing_where_nothing_is_rounded():
    """Smoothing and a low-rank branch leave the product as it is, but for what int8 rounds: with exact numbers, nothing."""
    transformer = model()
    weight = transformer.transformer_blocks[0].attn1.to_out[0].weight
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    smooth = torch.exp2(torch.randint(-2, 3, (32,)).float())
    numbers = torch.randint(-126, 127, (32, 32)).float()
    numbers[:, 0] = 127
    weight.copy_((numbers / 64 + up @ down) / smooth)
    plan = QuantizationPlan(
        layers={OUT: LayerPlan(format="int8", input_scale=1 / 32)},
        tensors={f"{OUT}.smooth": smooth, f"{OUT}.low_rank_up": up, f"{OUT}.low_rank_down": down},
    )
    x = torch.randint(-100, 100, (4, 32)) / 32 * smooth
    with QuantizedLinears(transformer, plan):
        got = transformer.transformer_blocks[0].attn1.to_out[0](x)
    torch.testing.assert_close(got, transformer.transformer_blocks[0].attn1.to_out[0](x), rtol=1e-5, atol=1e-4)


def test_plans_survive_a_file(tmp_path):
    plan = plan_of(model(), "nvfp4")
    save_plan(plan, tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert again.layers == plan.layers
    assert again.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in plan.tensors.items())


def one(kind="int8", scale=0.1, **tensors):
    return QuantizationPlan(
        layers={OUT: LayerPlan(format=kind, input_scale=scale)}, tensors={f"{OUT}.{name}": each for name, each in tensors.items()}
    )


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            QuantizationPlan(layers={"transformer_blocks.0.attn1.to_out.1": LayerPlan(format="fp8")}),
            r"got the group 'transformer_blocks.0.attn1.to_out.1'; did you mean 'transformer_blocks.0.attn1.to_out.0'\?",
        ),
        (QuantizationPlan(layers={"elsewhere": LayerPlan(format="fp8")}), "got the group 'elsewhere'; The model has 12"),
        (one("nvfp4", None), rf"{OUT}: got nvfp4 without input_scale; .* activation / {NVFP4_RANGE:g}"),
        (one(smooth=torch.ones(31)), rf"{OUT}.smooth: got shape \(31,\); expected \(32,\)"),
        (one(smooth=torch.zeros(32)), rf"{OUT}.smooth: got zeros"),
        (one(weight_scale=torch.full((32,), float("nan"))), rf"{OUT}.weight_scale: got zeros, negative numbers, infinity or NaN"),
        (one("nvfp4", weight_scale=torch.ones(32)), "got a weight_scale for nvfp4"),
        (one(low_rank_up=torch.ones(32, 2)), "shape|one of low_rank_down and low_rank_up"),
        (
            one(low_rank_up=torch.ones(32, 2), low_rank_down=torch.ones(3, 32)),
            r"low_rank_up: got shape \(32, 2\); expected \(32, 3\)",
        ),
    ],
)
def test_plans_that_do_not_fit(plan, words):
    with pytest.raises(SpecError, match=words):
        QuantizedLinears(model(), plan)


def test_a_depth_that_blocks_do_not_divide():
    with pytest.raises(SpecError, match="got nvfp4 for a depth of 24; expected a multiple of 16"):
        quantize_layer(one("nvfp4"), OUT, torch.ones(32, 24))


@pytest.mark.parametrize(("bad", "words"), [(0.0, "0"), (float("inf"), "inf"), (float("nan"), "nan")])
def test_ranges_that_give_no_scale(bad, words):
    """Of weights, and of activations; the layer is named."""
    transformer = model()
    transformer.transformer_blocks[0].attn1.to_out[0].weight.fill_(bad)
    with pytest.raises(CheckpointError, match=rf"{OUT}.weight: got a range of {words}"):
        QuantizedLinears(transformer, one())
    transformer = model()
    transformer.transformer_blocks[0].attn1.to_v.weight.fill_(bad)
    with InputRanges(transformer) as found:
        transformer(*inputs())
    with pytest.raises(CheckpointError, match=r"transformer_blocks.\d.\S+, activations: got a range of (0|inf|nan)"):
        found.largest()


TEXT = {"self_attn.to_qkv": ("q_proj", "k_proj", "v_proj"), "mlp.to_gate_up": ("gate_proj", "up_proj")}


def text_encoder():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes)
    encoder = Gemma2Encoder(config).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return encoder


def text_inputs():
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def test_groups_of_the_text_encoder():
    """Layers that share an input share a group, whatever stands before their names; norms and the table are in none."""
    encoder = text_encoder()
    names = [f"encoder.{name}" for name, _ in encoder.named_parameters()]
    found = groups_of(reversed(names))
    assert len(found) == 2 * 4
    for group, parts in TEXT.items():
        module = group.split(".")[0]
        assert found[f"layers.1.{group}"] == [f"encoder.layers.1.{module}.{part}.weight" for part in parts]
    assert found["layers.0.mlp.down_proj"] == ["encoder.layers.0.mlp.down_proj.weight"]
    assert prefix_of("encoder.layers.0.mlp.down_proj.weight") == "encoder."
    assert prefix_of("layers.0.mlp.up_proj.weight") == prefix_of("norm.weight") == ""
    assert group_of("encoder.embed_tokens.weight") is group_of("encoder.layers.0.input_layernorm.weight") is None
    assert group_of("decoder.layers.0.conv.weight") is None


@pytest.mark.parametrize("static", [True, False])
def test_a_text_encoder_in_w8a8_is_its_equation(static):
    """Each product as the equation says, written out in fp64; q, k and v with the scale and the smoothing of their group."""
    encoder = text_encoder()
    plan = plan_of_text(encoder, static)
    seen = {}
    for group, names in groups(encoder).items():
        for name in names:
            layer = encoder.get_submodule(name.removesuffix(".weight"))
            layer.register_forward_hook(lambda module, inputs, out, at=(group, name): seen.update({at: (inputs[0], out)}))
    with QuantizedLinears(encoder, plan):
        encoder(*text_inputs())
    assert len(seen) == 2 * 7
    parameters = dict(encoder.named_parameters())
    for (group, name), (x, out) in seen.items():
        smooth = plan.tensors[f"{group}.smooth"].double()
        wide = x.double() / smooth
        weight = parameters[name].double() * smooth
        scale = weight.abs().amax(1, keepdim=True) / 127
        step = plan.layers[group].input_scale
        step = wide.abs().amax(-1, keepdim=True) / 127 if step is None else step
        wanted = F.linear((wide / step).round().clamp(-128, 127) * step, (weight / scale).round() * scale)
        near = F.linear((x / smooth).float(), (parameters[name] * smooth).float()).double()
        assert (out - wanted).norm() < 0.1 * (near - wanted).norm()  # fp32 may tip a rounding


def plan_of_text(encoder, static):
    with InputRanges(encoder) as found:
        encoder(*text_inputs())
    scales = {group: static_scale("int8", 0.8 * most) for group, most in found.largest().items()}  # so that some are cut off
    plan = uniform_plan("int8", groups(encoder), scales if static else None)
    parameters = dict(encoder.named_parameters())
    for group, names in groups(encoder).items():
        plan.tensors[f"{group}.smooth"] = torch.rand(parameters[names[0]].shape[1]) + 0.5
    return plan


def test_a_plan_of_both(tmp_path):
    """One file for the denoiser and the text encoder: each finds its own part as it was."""
    denoiser, text = plan_of(model(), "nvfp4"), plan_of_text(text_encoder(), True)
    both = QuantizationPlan(layers={**denoiser.layers, **text.layers}, tensors={**denoiser.tensors, **text.tensors})
    save_plan(both, tmp_path / "plan")
    again = load_plan(tmp_path / "plan")
    for of_text, own in ((False, denoiser), (True, text)):
        part = part_of(again, text=of_text)
        assert plan_digest(part) == plan_digest(own)
        assert part.layers == own.layers
