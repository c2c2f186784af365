import os

import onnx
import pytest
from tiny_build import RANGES, component, quiet, request, runner, said, tiny

from engines.bundle import Bundle
from engines.errors import BuildError, PluginMissingError
from engines.spec import COMPONENTS, Precision, Target
from export.build import build
from export.components import profiles
from export.engine_graph import write_engine_graph
from export.plugin_nodes import add_cubins
from export.stages import engine_groups
from export.weights import DATA_NAME, TYPED_NAME
from plugins.launch import Launch
from sana_ref.checkpoint import load
from sana_ref.fused_decoder import FusedDecoder

AHEAD = (Target.SM89, Target.SM120)


def test_what_is_compiled_ahead_of_time_shares_an_engine():
    assert engine_groups((Target.SM80, Target.SM89)) == [(Target.SM80, Target.SM89)]
    assert engine_groups((Target.SM89, Target.SM90)) == [(Target.SM89,), (Target.SM90,)]
    assert engine_groups(()) == []


def test_profiles_serve_the_range():
    found = profiles(component("denoiser", Precision.FP16), RANGES, instructed_tokens=60, embedded_guidance=False)
    assert found["latents"] == ((1, 32, 2, 2), (1, 32, 4, 4), (4, 32, 8, 8))
    assert found["text_keys"] == found["text_values"] == tuple((1, k, batch, 4, 24, 16) for k, batch in ((1, 1), (2, 1), (2, 4)))
    assert found["coefficients"] == ((8,), (8,), (8,))
    found = profiles(component("text_projection", Precision.FP16), RANGES, instructed_tokens=60, embedded_guidance=False)
    assert found == {"prompt_embeds": ((1, 1, 1, 48), (2, 1, 24, 48), (2, 4, 24, 48))}
    found = profiles(component("text_encoder", Precision.BF16), RANGES, instructed_tokens=60, embedded_guidance=False)
    assert found["input_ids"] == ((1, 24), (1, 60), (4, 60))
    found = profiles(component("denoiser", Precision.FP16), RANGES, instructed_tokens=60, embedded_guidance=True)
    assert found["guidance_weights"] == ((1,), (1,), (1,))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.FP32])
def test_each_weight_of_the_transformer_is_in_one_graph(precision):
    text, step = component("text_projection", precision), component("denoiser", precision)
    parts = [{part.checkpoint_name(name) for name, _ in part.module.named_parameters()} for part in (text, step)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(load(tiny()).sources["transformer"].shapes)
    kinds = [{tensor.name: tensor.dtype for tensor in tensors} for tensors in (text.spec.outputs, step.spec.inputs)]
    assert kinds[0].items() <= kinds[1].items()


@pytest.mark.parametrize(
    ("precision", "plugins"),
    [
        (Precision.FP32, {"ReluLinearAttention": 1}),
        (
            Precision.BF16,
            {"Conv3x3": 5, "Conv3x3Norm": 4, "Conv3x3Upsample": 5}
            | dict.fromkeys(("GatedDepthwiseConv", "LinearAttentionApply", "LinearAttentionState", "MultiscaleProjection"), 1),
        ),
    ],
    ids=["fp32", "bf16"],
)
def test_decoders_are_fused_in_half_precision(precision, plugins):
    part = component("decoder", precision)  # whose export, elsewhere, raises for other numbers of nodes
    assert part.spec.plugins == plugins
    assert isinstance(part.module.decoder, FusedDecoder) == (precision is Precision.BF16)


@pytest.mark.slow
def test_a_build_with_engines(tmp_path, monkeypatch):
    # No engine of another test: what is in one is said when it is made.
    monkeypatch.setattr("export.stages.ENGINE_CODE", ("LICENSE",))
    progress = quiet()
    bundle = build(request(tmp_path / "bundle", targets=AHEAD), progress).bundle
    assert bundle.manifest.targets == AHEAD
    assert bundle.manifest.tensorrt is not None
    for name in COMPONENTS:
        for sm in ("sm89", "sm120"):
            path = bundle.engine_path(name, sm)
            assert path is not None
            assert path.name == "sm89-sm120.engine"
        assert bundle.engine_path(name, "sm86") is None
    assert "plugins: 5 Conv3x3, 1 MultiscaleProjection, 1 LinearAttentionState, " in said(progress)
    again = quiet()
    assert build(request(bundle.path, targets=AHEAD), again).unchanged
    part = "text_projection"  # the same graph, another engine
    other = build(request(bundle.path, targets=(Target.SM86,), components=(part,)), quiet()).bundle
    assert other.manifest.targets == (Target.SM86,)
    assert other.engine_path(part, "sm86") is not None
    assert Bundle.open(bundle.path).engine_path(part, "sm89") is None


@pytest.mark.slow
def test_a_plugin_that_is_not_registered_fails_the_build(monkeypatch):
    """Nothing else says so: TensorRT would inline the op's body and build an engine that is slower."""
    run = runner()
    part = component("denoiser", Precision.FP16)
    graphs = run.export(part)
    profile = profiles(part, RANGES, instructed_tokens=60, embedded_guidance=False)
    monkeypatch.setattr("export.engine_graph.add_cubins", lambda model, targets: 0)  # nodes without the attributes of a plugin
    with pytest.raises(
        PluginMissingError,
        match="none; expected 1 CrossAttention, 1 GatedDepthwiseConv, 1 GatedModulatedNorm, 1 LinearAttentionApply, ",
    ):
        run.engine(part, graphs, (Target.SM121,), profile)  # that no other test compiles for


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "linear"), [((Target.SM90,), True), (AHEAD, False)])
def test_attention_of_a_text_reads_what_a_product_leaves(monkeypatch, tmp_path, targets, linear):
    """On SM 90 q, k and v are one product, and nothing is between it and attention; elsewhere TensorRT has their Concat."""
    monkeypatch.setattr("engines.tensorrt.flavor", lambda: "rtx")
    graphs = runner().export(component("text_encoder", Precision.BF16))
    os.link(graphs.folder / DATA_NAME, tmp_path / DATA_NAME)
    plugins = write_engine_graph(component("text_encoder", Precision.BF16), graphs.folder / TYPED_NAME, tmp_path, targets)
    layers = plugins["RotateHeads"]
    products = {"Linear": 4 * layers} if linear else {}  # q, k, v; what they attend to; gate, up; down
    assert plugins == {"CausalAttention": layers, "NormedSum": 2 * layers, "RotateHeads": layers} | products
    graph = onnx.load(tmp_path / TYPED_NAME, load_external_data=False).graph
    maker = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "CausalAttention":
            turned, qkv, live = (maker[name] for name in node.input)
            assert turned.op_type == "RotateHeads"
            assert maker[turned.input[0]] is qkv
            assert qkv.op_type == ("Linear" if linear else "Concat")
            assert live.op_type == "Cast"
            launch = Launch.from_json(next(each.s for each in node.attribute if each.name == "launch"))
            assert sorted(launch.kernels) == sorted(targets)


@pytest.mark.slow
def test_cubins_come_only_with_an_op_and_a_shape_that_have_a_kernel():
    graphs = runner().export(component("denoiser", Precision.FP16))
    model = onnx.load(graphs.folder / "typed.onnx", load_external_data=False)
    assert add_cubins(model, (Target.SM89,)) == 6
    nodes = {node.op_type: node for node in model.graph.node if node.domain == "sana"}
    plugins = {"launch", "cubins", "plugin_version", "plugin_namespace"}
    assert {op: {a.name for a in node.attribute} for op, node in nodes.items()} == {
        "CrossAttention": plugins | {"block"},
        "GatedDepthwiseConv": plugins | {"channels"},
        "GatedModulatedNorm": plugins | {"rows", "rms", "eps"},
        "LinearAttentionApply": plugins | {"split", "axis", "eps"},
        "LinearAttentionState": plugins | {"split", "axis"},
        "ModulatedNorm": plugins | {"rows", "rms", "eps"},
    }
    node = nodes["LinearAttentionState"]
    assert not any(
        a.name == "cubins"
        for n in onnx.load(graphs.folder / "model.onnx", load_external_data=False).graph.node
        for a in n.attribute
    )
    split = next(a for a in node.attribute if a.name == "split")
    split.ints[-1] = 40
    with pytest.raises(BuildError, match=r"no kernel.*head_dim 40"):
        add_cubins(model, (Target.SM89,))
    node.op_type = "Unknown"
    with pytest.raises(BuildError, match="got the op Unknown"):
        add_cubins(model, (Target.SM89,))
