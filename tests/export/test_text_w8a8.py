"""The text encoder with weights and activations in 8 bits: its graph, its engine, what a build follows and what it refuses."""

import json
from collections import Counter
from dataclasses import replace

import onnx
import pytest
import torch
from quantized_text import DOWN, GATE_UP, OUT, PLANS, QKV, cases, encoder, exported, plan, simulated
from tiny_build import RANGES, component, quiet, request, runner, said, tiny
from tiny_recipes import SHORT, command, prompts, recipe

from engines.bundle import Bundle
from engines.errors import BuildError, ConfigError, SpecError
from engines.golden import Golden
from engines.parity_report import measure
from engines.spec import Precision, Target
from export import stages as export_stages
from export.build import build
from export.calibrate import main as calibrate
from export.components import profiles, with_weights
from export.parity import run_onnxruntime
from export.plans import check_request
from export.qdq_nodes import quantize_graph
from export.quantization_request import QuantizationRequest, quantization_of, weights_of
from export.recipe import load_recipe
from export.settings import load
from export.stages import weights_of as report_of
from export.text_plans import check_text, left_out
from export.weight_only import check_weights, for_targets
from export.weights import PORTABLE_NAME, TYPED_NAME
from sana_ref.quantization import LayerPlan, QuantizationPlan, load_plan, part_of, save_plan

W8A8 = {"text_encoder": "w8a8"}
KERNEL = b"function={ name"  # in an engine of TensorRT 1.7, once for each
STATIC = LayerPlan(format="int8", input_scale=0.05)


@pytest.fixture(autouse=True)
def _export_once(monkeypatch):
    monkeypatch.setattr(export_stages, "export_module", lambda module, spec: exported(spec.inputs[0].name).clone())


def graph(name: str, file: str) -> onnx.GraphProto:
    return onnx.load(runner().export(encoder(name)).folder / file, load_external_data=False).graph


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_onnxruntime_computes_the_simulation(name):
    """The graph is fp32 between the products. It may be off the simulation with fp64 there by twice what that with fp32 is.

    A number that is rounded to the wrong neighbour costs a thousand times as much, so none is.
    """
    exact, same = (simulated(name, dtype) for dtype in (torch.float64, torch.float32))
    golden = {case: Golden(inputs=dict(inputs), outputs={}) for case, inputs in cases().items()}
    got = run_onnxruntime(runner().export(encoder(name)).folder / PORTABLE_NAME, golden, frugal=False)

    def largest(outputs):
        return max(measure(outputs[case]["prompt_embeds"], exact[case]["prompt_embeds"]).rms for case in exact)

    assert 0 < largest(got) <= 2 * largest(same)


@pytest.mark.slow
def test_nodes():
    """Products of one input share its numbers: four QuantizeLinear a layer, and seven dequantised weights, beside the table."""
    counts = Counter(node.op_type for node in graph("static", TYPED_NAME).node)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (4, 4 + 7 + 1)
    assert not Counter(node.op_type for node in graph("a token", TYPED_NAME).node)["QuantizeLinear"]
    kept = Counter(node.op_type for node in graph("kept", TYPED_NAME).node)
    assert (kept["QuantizeLinear"], kept["DequantizeLinear"]) == (3, 3 + 7 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_every_weight_is_stored_in_8_bits(name):
    """Planned ones with fp32 scales, as for the denoiser; the table and a group that is kept with scales in bf16."""
    typed = {each.name: each for each in graph(name, TYPED_NAME).initializer}
    sizes = dict(encoder(name).module.named_parameters())
    narrow = {each for each in sizes if sizes[each].ndim == 2}
    assert not narrow & set(typed)
    kept = [DOWN] if name == "kept" else []
    for group, parts in ((QKV, ("q_proj", "k_proj", "v_proj")), (OUT, ()), (GATE_UP, ("gate_proj", "up_proj")), (DOWN, ())):
        for part in parts or [""]:
            stem = f"encoder.{group}" + (f".{part}" if part else "")
            numbers, scale = (
                (f"{stem}.weight.numbers", f"{stem}.weight.scale")
                if group in kept
                else (f"{stem}.weight_numbers", f"{stem}.weight_scale")
            )
            assert typed[numbers].data_type == onnx.TensorProto.INT8
            assert typed[scale].data_type == (onnx.TensorProto.BFLOAT16 if group in kept else onnx.TensorProto.FLOAT)
    assert typed["encoder.embed_tokens.weight.scale"].data_type == onnx.TensorProto.BFLOAT16


def stages(part):
    """The report of weights, and what the parity check found of ONNX Runtime."""
    made = runner()
    reference = made.reference(part, cases, {"test": "w8a8"})
    graphs = made.export(part)
    report = made.weights(part, graphs, reference)
    outputs = json.loads((made.parity(part, graphs, reference, ()).folder / "parity.json").read_text())["outputs"]
    return report_of(report), outputs["prompt_embeds"]


@pytest.mark.slow
def test_the_report_and_the_bound():
    report, parity = stages(encoder("static"))
    alone, _ = stages(replace(component("text_encoder", Precision.BF16), weights="int8"))
    assert (report.format, report.table, report.activations, report.precision) == ("int8", None, "int8", "bf16")
    assert (alone.activations, alone.format) == (None, "int8")
    assert "weights int8 under int8, 0." in report.lines()[0]
    assert {name: role.tensors for name, role in report.roles.items()} == {
        "embed_tokens": 1,
        "self_attn.to_qkv": 1,
        "self_attn.o_proj": 1,
        "mlp.to_gate_up": 1,
        "mlp.down_proj": 1,
    }
    sizes = dict(encoder("static").module.named_parameters())
    assert sum(role.bytes_before for role in report.roles.values()) == 2 * sum(p.numel() for p in sizes.values() if p.ndim == 2)
    assert all(0 < role.error < 0.02 for role in report.roles.values())
    # activations are rounded too, which is seen in the report; and the error is that of the simulation, seen by the parity check
    assert 1.2 * alone.outputs["prompt_embeds"].rms < report.outputs["prompt_embeds"].rms < 0.1
    assert parity["bound"]["rms"] == pytest.approx(2 * parity["pytorch"]["rms"])
    assert parity["portable_bound"] is None
    assert 0 < parity["onnxruntime"]["rms"] <= parity["bound"]["rms"]


@pytest.mark.slow
def test_ranges_are_of_the_weights_as_they_are_stored():
    """Those of a build whose table is stored in another way are not taken from the cache."""
    found, plan_ = [], encoder("static").plan

    def make():
        found.append(part)
        return plan_

    for table in ("int4", "host", "int4", "host"):
        part = replace(component("text_encoder", Precision.BF16), weights="int8", table=table)
        runner().ranges(part, make, {"test": "ranges of weights"})
    assert [each.table for each in found] == ["int4", "host"]


@pytest.mark.slow
def test_a_group_whose_products_are_not_all_there():
    model, load_ = exported().clone(), runner().loader(component("text_encoder", Precision.BF16))
    for node in model.graph:
        if any(value is not None and value.name == "encoder.layers.0.mlp.up_proj.weight" for value in node.inputs):
            node.op_type = "Identity"
    with pytest.raises(BuildError, match=r"got no product with the weight of 'layers\.0\.mlp\.to_gate_up'"):
        quantize_graph(model, plan("static"), load_, torch.bfloat16)


def int8_products(engine: bytes) -> list[str]:
    """Names of an engine's products whose factors are both int8, the second a weight: TensorRT 1.7 writes down what it made."""
    lines = engine.decode("latin-1").splitlines()
    int8 = {line.split('name="')[1].split('"')[0] for line in lines if "tensor={" in line and line.rstrip().endswith("type=int8 }")}
    weights = {name for name in int8 if any(f'name="{name}"' in line and "const_payload_size" in line for line in lines)}
    found = []
    for line in lines:
        if "fully_connected={" in line:
            name, x, weight = (part.split('"')[1::2] for part in (line.split("name=")[1].split("output=")[0], *_factors(line)))
            found += name if x[0] in int8 and weight[0] in weights else []
    return found


def _factors(line: str) -> list[str]:
    words = line.split("input={")[1].split("}")[0].split()
    return words[:2]


def engine(part, targets=(Target.SM80, Target.SM86, Target.SM89, Target.SM120)):
    """For all architectures that INT8 is for, made without a GPU."""
    made, profile = runner(), profiles(part, RANGES, instructed_tokens=60, embedded_guidance=False)
    return made.engine(part, made.export(part), targets, profile)


@pytest.mark.slow
def test_engines_multiply_in_8_bits():
    """q, k and v are one product, and gate and up. Smoothing is part of kernels that are there anyway."""
    part = encoder("static")
    made, data = engine(part), engine(part).path.read_bytes()
    assert [name.count("node_linear") for name in int8_products(data)] == [3, 1, 2, 1]
    stored = sum(parameter.numel() for _, parameter in part.module.named_parameters())
    assert made.memory()["Weights"] < 1.3 * stored + 512 * 40
    assert not int8_products(engine(replace(part, plan=None), (Target.SM80,)).path.read_bytes())
    plain = engine(replace(part, plan=plan("static").model_copy(update={"tensors": {}}))).path.read_bytes()
    assert data.count(KERNEL) == plain.count(KERNEL) > 0


def of(*keys, **flags):
    return weights_of(load(flags={"precision": "int8", "recipe_keys": ["text_encoder=w8a8", *keys], **flags}))


@pytest.mark.slow
def test_what_a_recipe_says():
    assert of() == {"text_encoder": "w8a8", "text_encoder_table": "host", "text_projection": "int8"}
    assert of("text_encoder_table=int8").keys() == of("text_encoder_table=null").keys() == {"text_encoder", "text_projection"}
    assert of(calibrate=False)["text_encoder"] == "w8a8"
    made = with_weights({"text_encoder": component("text_encoder", Precision.BF16)}, {**W8A8, "text_encoder_table": "int4"})
    assert (made["text_encoder"].weights, made["text_encoder"].table) == ("int8", "int4")
    groups = [QKV, OUT, GATE_UP, DOWN]
    assert load_recipe("int8", ["text_encoder_keep=['*.mlp.*']"]).of_text(groups) == {
        QKV: "int8",
        OUT: "int8",
        GATE_UP: "none",
        DOWN: "none",
    }


@pytest.mark.parametrize("given", [{"calibrate": False}, {"plan": "plan.safetensors"}], ids=["without", "plan"])
def test_keys_of_a_calibration_are_refused_without_one(given):
    settings = load(flags={"precision": "int8", "recipe_keys": ["text_encoder=w8a8", "text_encoder_keep=['*.mlp.*']"], **given})
    with pytest.raises(SpecError, match=r"recipe-key: got text_encoder=w8a8,text_encoder_keep=.* expected a calibration"):
        quantization_of(settings)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["text_encoder=w8a9"], "text_encoder: got 'w8a9'; did you mean 'w8a8'[?] Valid: int4, int8, fp8, w8a8, null"),
        (["text_encoder_table=w8a8"], "text_encoder_table: got 'w8a8'; .*Valid: int4, int8, fp8, host, null"),
        (["text_projection=w8a8"], "text_projection: got 'w8a8'; .*Valid: int4, int8, fp8, null"),
        (["text_encoder_smoothquant=1.5"], "text_encoder_smoothquant"),
    ],
)
def test_wrong_words(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe("int8", keys)


def test_a_pattern_that_matches_no_group():
    with pytest.raises(ConfigError, match=r"text_encoder_keep: got '\*\.downproj', which matches no group .* nearest is"):
        load_recipe("int8", ["text_encoder_keep=['*.downproj']"]).of_text([QKV, OUT, GATE_UP, DOWN])


def test_targets():
    check_weights(W8A8, (Target.SM80, Target.SM86, Target.SM89, Target.SM120, Target.SM121))
    progress = quiet()
    assert for_targets(W8A8, (Target.SM90,), progress) == {}
    assert "text encoder (w8a8): weights stay 16-bit for sm90" in said(progress)


def planned(tmp_path, **layers):
    path = tmp_path / "plan.safetensors"
    save_plan(QuantizationPlan(layers={"transformer_blocks.0.ff.conv_point": STATIC, **layers}), path)
    return path


@pytest.mark.parametrize(
    ("layers", "targets", "words"),
    [
        ({}, (), "without a layer of the text encoder, which text_encoder w8a8 asks for.* or set --recipe-key text_encoder=int8"),
        ({DOWN: LayerPlan(format="none")}, (Target.SM89,), "without a layer of the text encoder"),
        ({QKV: STATIC, DOWN: LayerPlan(format="fp8")}, (), rf"plan, {DOWN}: got fp8; expected int8 or none"),
        ({QKV: LayerPlan(format="int8")}, (Target.SM89,), rf"plan, {QKV}: got int8 without input_scale for sm89"),
    ],
)
def test_plans_that_a_build_refuses(tmp_path, layers, targets, words):
    wanted = request(tmp_path / "out", precision=Precision.INT8, targets=targets, weights=W8A8, plan=planned(tmp_path, **layers))
    check = check_request if "input_scale" in words else check_text
    with pytest.raises(SpecError, match=words):
        check(wanted)


def test_a_plan_of_the_denoiser_is_enough_for_sm90_and_for_weights_alone(tmp_path):
    for targets, weights in (((Target.SM90,), W8A8), ((), {"text_encoder": "int8"})):
        check_text(request(tmp_path / "out", precision=Precision.FP8, targets=targets, weights=weights, plan=planned(tmp_path)))


def test_what_a_plan_says_of_the_text_encoder_is_not_left_out_in_silence(tmp_path):
    both = request(
        tmp_path / "out", precision=Precision.INT8, weights={"text_encoder": "int8"}, plan=planned(tmp_path, **{QKV: STATIC})
    )
    assert "its layers of the text encoder are left out; --recipe-key text_encoder=w8a8 would take them" in str(left_out(both))
    assert "16-bit weights on sm90" in str(left_out(replace(both, weights=W8A8, targets=(Target.SM90,))))
    assert left_out(replace(both, weights=W8A8)) is left_out(replace(both, components=("denoiser",))) is None
    assert left_out(replace(both, plan=planned(tmp_path))) is None


def test_scales_a_token_are_refused_for_tensorrt(tmp_path):
    asked = QuantizationRequest(recipe=recipe("nvfp4", "text_encoder=w8a8", "activations=dynamic"), name="nvfp4")
    wanted = request(tmp_path / "out", precision=Precision.NVFP4, targets=(Target.SM120,), weights=W8A8, quantization=asked)
    with pytest.raises(
        SpecError, match=r"recipe nvfp4, activations: got dynamic for sm120 with text_encoder w8a8; expected static"
    ):
        check_text(wanted)
    check_text(replace(wanted, targets=()))


WORDS = ("--precision", "int8", "--components", "text_encoder", "--recipe-key", "text_encoder=w8a8")


@pytest.mark.slow
def test_a_build_that_calibrates(tmp_path, capsys):
    keys = [word for key in SHORT for word in ("--recipe-key", key)]
    assert command(tmp_path / "b", *WORDS, *keys, "--calibration-prompts", str(prompts())) == 0
    heard = capsys.readouterr().err
    assert "what was seen in the text encoder: " in heard
    assert "bf16, weights int8, table on the host, activations int8" in heard
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.precision == {"text_encoder": "bf16"}
    assert json.loads((bundle.path / "text_encoder/quantization.json").read_text())["activations"] == "int8"
    settings = load(flags={"precision": "int8", "recipe_keys": ["text_encoder=w8a8", *SHORT], "calibration_prompts": prompts()})
    _, asked = quantization_of(settings)
    wanted = request(
        tmp_path / "b",
        precision=Precision.INT8,
        components=("text_encoder",),
        weights=weights_of(settings),
        quantization=asked,
    )
    assert build(wanted, quiet()).unchanged


def operators_of(bundle):
    return Counter(node.op_type for node in onnx.load(bundle / "text_encoder/model.onnx", load_external_data=False).graph.node)


@pytest.mark.slow
def test_a_build_without_a_calibration(tmp_path, capsys):
    """Scales a token for ONNX Runtime, and of the parity check's inputs for TensorRT, as the denoiser's in INT8."""
    assert command(tmp_path / "a", *WORDS, "--no-calibrate") == 0
    assert "ranges text_encoder" not in capsys.readouterr().err
    operators = operators_of(tmp_path / "a")
    assert (operators["ReduceMax"], operators["QuantizeLinear"]) == (4, 0)
    assert command(tmp_path / "b", *WORDS, "--no-calibrate", "--target", "sm89") == 0
    assert "ranges text_encoder" in capsys.readouterr().err
    operators = operators_of(tmp_path / "b")
    assert operators["QuantizeLinear"] == 4


@pytest.mark.slow
def test_one_file_of_a_calibration_has_both_plans(tmp_path):
    out = tmp_path / "calibration"
    words = ["--model", str(tiny()), "--recipe", "int8", "--out", str(out), "--cache", str(runner().store.root), *SHORT]
    assert calibrate([*words, f"calibration.prompts={prompts()}", "text_encoder=w8a8"]) == 0
    assert {path.name for path in (out / "text_encoder").iterdir()} == {"calibration.json", "calibration.html"}
    both = load_plan(out / "plan.safetensors")
    assert len(part_of(both, text=False).layers) == 6
    text = part_of(both, text=True)
    assert text.layers == plan("static").layers
    assert all(torch.equal(tensor, plan("static").tensors[name]) for name, tensor in text.tensors.items())
    assert command(tmp_path / "b", *WORDS, "--plan", str(out / "plan.safetensors")) == 0
    assert json.loads((tmp_path / "b/text_encoder/quantization.json").read_text())["activations"] == "int8"
