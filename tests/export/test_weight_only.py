"""The text's components with weights in 4 or 8 bits: their graphs, what a build refuses, and what its bundle says."""

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_build import PARTS, RANGES, component, quiet, request, runner, said
from tiny_checkpoint import TEXT_ENCODER, write_checkpoint
from tiny_recipes import command

from apps.cli.inspect import read_weights
from apps.cli.main import main as sana
from engines.bundle import Bundle
from engines.errors import BuildError, CheckpointError, ConfigError, ManifestError, SpecError
from engines.golden import Golden
from engines.spec import Precision, Target
from engines.weight_report import parse_weights
from export import stages as export_stages
from export.build import build
from export.components import Component, profiles
from export.onnx_export import export_module
from export.quantization_request import weights_of
from export.recipe import load_recipe
from export.settings import load
from export.stages import weights_of as report_of
from export.weight_only import check_weights, for_targets, output_errors, text_weights
from export.weight_only_nodes import pack_graph
from export.weights import DATA_NAME, PORTABLE_NAME, TYPED_NAME
from sana_ref.weight_only import WEIGHT_FORMATS, pack_weight

TYPES = {"int4": onnx.TensorProto.INT4, "int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
LOOKUPS = {"int4": "Int4Rows", "int8": "Int8Rows", "fp8": "Fp8Rows"}
BOTH = [(name, kind) for name in ("text_encoder", "text_projection") for kind in WEIGHT_FORMATS]
IDS = ["-".join(pair) for pair in BOTH]


@functools.cache
def exported(inputs: tuple[str, ...]):
    """The export knows nothing of formats, and takes most of the time."""
    names = {"input_ids": "text_encoder", "inputs_embeds": "text_encoder", "prompt_embeds": "text_projection"}
    part = packed(names[inputs[0]], "/host" if inputs[0] == "inputs_embeds" else None)
    return export_module(part.graph_module, part.graph_spec)


@pytest.fixture(autouse=True)
def _export_once(monkeypatch):
    monkeypatch.setattr(
        export_stages, "export_module", lambda module, spec: exported(tuple(each.name for each in spec.inputs)).clone()
    )


@functools.cache
def packed(name: str, kind: str | None) -> Component:
    """kind: of weights; int8/int4: of weights and of the table of tokens."""
    precision = Precision.BF16 if name == "text_encoder" else Precision.FP16
    weights, _, table = (kind or "").partition("/")
    return replace(component(name, precision), weights=weights or None, table=table or None)  # type: ignore[arg-type]


def graph(name: str, kind: str, file: str) -> onnx.ModelProto:
    return onnx.load(runner().export(packed(name, kind)).folder / file, load_external_data=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), BOTH, ids=IDS)
def test_every_weight_is_stored_narrow(name, kind):
    """With scales in the component's type; norms and biases stay. Both graphs read the same bytes."""
    part = packed(name, kind)
    half = onnx.TensorProto.BFLOAT16 if name == "text_encoder" else onnx.TensorProto.FLOAT16
    typed, portable = (
        {each.name: each for each in graph(name, kind, file).graph.initializer} for file in (TYPED_NAME, PORTABLE_NAME)
    )
    shapes = {parameter: tensor.shape for parameter, tensor in part.module.named_parameters()}
    assert len(part.packed) == sum(len(shape) == 2 for shape in shapes.values() if len(shape) == 2)
    for weight in part.packed:
        assert weight not in typed
        assert (typed[f"{weight}.numbers"].data_type, typed[f"{weight}.scale"].data_type) == (TYPES[kind], half)
        stored = portable.get(f"{weight}.numbers") or portable[f"{weight}.numbers_bytes"]
        places = [{entry.key: entry.value for entry in each.external_data} for each in (typed[f"{weight}.numbers"], stored)]
        assert places[0] == places[1]
        assert int(places[0]["length"]) == shapes[weight].numel() // (2 if kind == "int4" else 1)
    assert set(shapes) - set(part.packed) <= set(typed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
def test_tables(kind):
    """Dequantised before the look-up for TensorRT, behind it in the portable graph."""
    typed, portable = (graph("text_encoder", kind, file).graph for file in (TYPED_NAME, PORTABLE_NAME))
    table = next(node for node in typed.node if "encoder.embed_tokens.weight.real" in node.input)
    assert table.op_type == "Gather"
    counts = [Counter(node.op_type for node in each.node) for each in (typed, portable)]
    assert counts[0]["DequantizeLinear"] == len(packed("text_encoder", kind).packed) == counts[1]["DequantizeLinear"] + 1
    assert counts[1][LOOKUPS[kind]] == 1


@functools.cache
def stages(name: str, kind: str):
    """Reference, parity and report of a component; the text projection's inputs are random embeddings."""
    made, part = runner(), packed(name, kind)
    generator = np.random.default_rng(0)
    if name == "text_encoder":
        ids = generator.integers(0, 260, (2, 30))
        cases = {"text": {"input_ids": ids, "attention_mask": np.ones_like(ids)}}
    else:
        cases = {"text": {"prompt_embeds": generator.standard_normal((2, 1, 9, 48)).astype(np.float32)}}
    reference = made.reference(part, lambda: cases, {"test": "weights"})
    graphs = made.export(part)
    report = made.weights(part, graphs, reference)
    assert report is not None
    return made.parity(part, graphs, reference, ()), report_of(report)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), BOTH, ids=IDS)
def test_onnxruntime_computes_pytorch_s_weights(name, kind):
    """The bound is PyTorch's own at fp32 with the dequantised weights (fp64 is exact): one wrong number would be far past it."""
    parity, _ = stages(name, kind)
    outputs = json.loads((parity.folder / "parity.json").read_text())["outputs"]
    for output in outputs.values():
        assert 0 < output["onnxruntime"]["rms"] < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), BOTH, ids=IDS)
def test_the_report(name, kind):
    _, report = stages(name, kind)
    least, most = {"int4": (0.03, 0.2), "int8": (0.001, 0.02), "fp8": (0.01, 0.05)}[kind]
    part = packed(name, kind)
    assert (report.format, report.precision) == (kind, part.precision)
    assert sum(role.tensors for role in report.roles.values()) == len(part.packed)
    sizes = dict(part.module.named_parameters())
    assert sum(role.bytes_before for role in report.roles.values()) == 2 * sum(sizes[each].numel() for each in part.packed)
    for role in report.roles.values():
        assert least < role.error < most
        assert role.bytes_after < 0.63 * role.bytes_before  # blocks of 16 and short rows, whose scales weigh more
    for output in report.outputs.values():
        assert 0 < output.rms < 5 * most
        assert output.least_cosine <= output.cosine < 1
    again = parse_weights(report.model_dump_json().encode(), source="the test")
    assert again == report
    assert "of their bytes; most is lost of" in report.lines()[0]


@pytest.mark.slow
def test_a_table_in_4_bits_under_weights_in_8():
    part = packed("text_encoder", "int8/int4")
    name = "encoder.embed_tokens.weight"
    typed, portable = (graph("text_encoder", "int8/int4", file).graph for file in (TYPED_NAME, PORTABLE_NAME))
    types = {each.name: each.data_type for each in typed.initializer}
    assert types[f"{name}.numbers"] == TYPES["int4"]
    assert {types[f"{each}.numbers"] for each in part.packed if each != name} == {TYPES["int8"]}
    assert [node.op_type for node in portable.node if node.op_type in LOOKUPS.values()] == ["Int4Rows"]
    parity, report = stages("text_encoder", "int8/int4")
    assert (report.format, report.table) == ("int8", "int4")
    assert "weights int8, table int4 under bf16" in report.lines()[0]
    assert report.roles["embed_tokens"].error > 0.03 > 0.02 > report.roles["mlp.up_proj"].error
    assert report.roles["embed_tokens"].bytes_after < 0.33 * report.roles["embed_tokens"].bytes_before
    outputs = json.loads((parity.folder / "parity.json").read_text())["outputs"]
    assert all(0 < output["onnxruntime"]["rms"] < 5e-6 for output in outputs.values())


def test_padding_does_not_count():
    """(1, 3, 2): of 4 places the first and the last two are kept, and the last is padding."""
    mask = np.array([[1, 1, 1, 0]])
    exact = np.array([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    got = np.array([[[1.0, 0.0], [1.0, 2.0], [-9.0, 9.0]]])
    case = Golden(inputs={"attention_mask": mask}, outputs={"prompt_embeds": got})
    error = output_errors({"a": {"prompt_embeds": exact}}, {"a": case})["prompt_embeds"]
    assert error.rms == pytest.approx((1 / 5) ** 0.5)
    assert error.least_cosine == pytest.approx(4 / (2 * 5**0.5))
    assert error.cosine == pytest.approx((1 + error.least_cosine) / 2)
    without = output_errors({"a": {"prompt_embeds": exact}}, {"a": Golden(inputs={}, outputs={"prompt_embeds": got})})
    assert without["prompt_embeds"].rms > 1


def test_a_report_that_is_none():
    with pytest.raises(ManifestError, match="format"):
        parse_weights(b'{"format": "int3", "precision": "bf16", "roles": {}, "outputs": {}}', source="the test")


def test_a_component_without_has_no_report():
    assert packed("text_encoder", None).packed == {}
    assert runner().weights(packed("text_encoder", None), None, None) is None  # type: ignore[arg-type]


def test_the_loader_dequantises():
    part, made = packed("text_encoder", "int4"), runner()
    name = [*part.packed][-1]
    stored, loaded = made.stored(part)(name), made.loader(part)(name)
    assert torch.equal(loaded, pack_weight(stored, "int4", name, torch.bfloat16).real())
    assert not torch.equal(loaded, stored.bfloat16())
    assert torch.equal(made.loader(part)("encoder.norm.weight"), made.stored(part)("encoder.norm.weight"))


@pytest.mark.slow
def test_a_name_that_the_graph_has_not():
    part = packed("text_projection", "int8")
    with pytest.raises(BuildError, match="got no parameter 'x'"):
        pack_graph(exported(("prompt_embeds",)).clone(), runner().stored(part), {"x": "int8"}, torch.float16, lambda *_: None)


@pytest.mark.slow
def test_what_the_recipes_ask_for():
    int8 = {"text_encoder": "int8", "text_encoder_table": "host", "text_projection": "int8"}
    assert text_weights(load_recipe("int8")) == text_weights(load_recipe("fp8")) == int8
    assert text_weights(load_recipe("nvfp4")) == dict.fromkeys(int8, "int4") | {"text_encoder_table": "host"}
    without = load_recipe("fp8", ["text_encoder=null"])  # a table on the host needs no narrow weights beside it, another does
    assert text_weights(without).keys() == {"text_encoder_table", "text_projection"}
    without = load_recipe("fp8", ["text_encoder=null", "text_encoder_table=int4"])
    assert text_weights(without).keys() == {"text_projection"}
    alike = load_recipe("fp8", ["text_encoder=int4", "text_encoder_table=int4"])  # of the same format it is no format of its own
    assert text_weights(alike) == text_weights(load_recipe("fp8", ["text_encoder=int4", "text_encoder_table=null"]))


def test_recipes_of_before_say_nothing_of_the_text(tmp_path):
    values = load_recipe("int8").model_dump(mode="json", exclude={"text_encoder", "text_encoder_table", "text_projection"})
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    assert text_weights(load_recipe(path)) == {}


def of(**flags: object):
    return weights_of(load(flags=flags))


@pytest.mark.slow
def test_what_a_build_is_asked_for(tmp_path):
    assert of(precision="fp16") == of(precision="bf16") == {}
    assert of(precision="nvfp4", plan=tmp_path / "plan")["text_encoder"] == "int4"
    assert of(precision="int8", calibrate=False, recipe_keys=["text_encoder=int4"])["text_encoder"] == "int4"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["text_encoder=int3"], "text_encoder: got 'int3'; did you mean 'int8'[?] Valid: int4, int8, fp8, w8a8, null"),
        (["text_encoder_table=int5"], "text_encoder_table: got 'int5'; .*Valid: int4, int8, fp8, host, null"),
        (["text_encoder=host"], "text_encoder: got 'host'; .*Valid: int4, int8, fp8, w8a8, null"),
        (["text_projection=nvfp4"], "text_projection: got 'nvfp4'; .*Valid: int4, int8, fp8, null"),
        (["text_encodr=int4"], "did you mean 'text_encoder'"),
    ],
)
def test_wrong_words(keys, words):
    with pytest.raises(ConfigError, match=words):
        of(precision="int8", recipe_keys=keys)


def test_what_a_target_cannot_run():
    both = {"text_encoder": "fp8", "text_projection": "int8"}
    check_weights(both, (Target.SM89, Target.SM120))
    with pytest.raises(SpecError, match="Set text_encoder_table to int8"):
        check_weights({"text_encoder": "int8", "text_encoder_table": "fp8"}, (Target.SM86,))
    check_weights({"text_encoder": "int4", "text_projection": "int8"}, (Target.SM80, Target.SM86))
    with pytest.raises(SpecError, match=r"text_encoder: got fp8 for sm80, sm86; expected sm89 or later.*Set text_encoder to int8"):
        check_weights(both, (Target.SM80, Target.SM86, Target.SM89))


def test_a_build_refuses_it_before_it_reads_anything(tmp_path):
    wanted = request(tmp_path / "out", model=tmp_path / "none", targets=(Target.SM86,), weights={"text_encoder": "fp8"})
    with pytest.raises(SpecError, match="text_encoder: got fp8 for sm86"):
        build(wanted, quiet())


def test_sm90_keeps_them_as_they_are():
    both, progress = {"text_encoder": "int4", "text_projection": "int8"}, quiet()
    assert for_targets(both, (Target.SM89,), progress) == both  # type: ignore[arg-type]
    assert not said(progress)
    assert for_targets(both, (Target.SM90,), progress) == {}  # type: ignore[arg-type]
    assert "text encoder (int4) and text projection (int8): weights stay 16-bit for sm90" in said(progress)
    table = {"text_encoder_table": "host"}
    assert for_targets(both | table, (Target.SM90, Target.SM120), progress) == table  # type: ignore[arg-type]
    assert for_targets(table, (Target.SM90,), progress := quiet()) == table  # type: ignore[arg-type]
    assert not said(progress)


@pytest.mark.slow
def test_a_build_and_what_its_bundle_says(tmp_path, capsys):
    words = ["--precision", "nvfp4", "--no-calibrate", "--recipe-key", "text_projection=fp8"]
    assert command(tmp_path / "b", *words, "--components", "text_encoder,text_projection") == 0
    heard = capsys.readouterr().err
    assert "text_encoder: weights int4, table on the host under bf16" in heard
    assert "text_projection: weights fp8 under fp16" in heard
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.precision == {"text_encoder": "bf16", "text_projection": "fp16"}
    assert {name: report.format for name, report in read_weights(bundle).items()} == {
        "text_encoder": "int4",
        "text_projection": "fp8",
    }
    assert bundle.manifest.files["text_encoder/quantization.json"].role == "report"
    assert read_weights(bundle)["text_encoder"].table == "host"
    assert "embed_tokens" not in read_weights(bundle)["text_encoder"].roles  # nothing of it is lost
    assert sana(["inspect", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "Weights of the text encoder" in shown
    assert f"{TEXT_ENCODER.vocab_size} rows, on the host" in shown


@pytest.mark.slow
def test_a_checkpoint_with_a_row_that_is_not_finite(tmp_path):
    folder = write_checkpoint(tmp_path / "nan", **PARTS)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    tensors[name][5, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = request(tmp_path / "out", model=Path(folder), components=("text_encoder",), weights={"text_encoder": "int8"})
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight', row 5: got a range of nan"):
        build(wanted, quiet())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_engine_holds_them_narrow(kind):
    """By what TensorRT says that its engine needs: numbers and scales, and what stays, each aligned to 512 bytes at most."""
    part, made = packed("text_projection", kind), runner()
    profile = profiles(part, RANGES, instructed_tokens=60, embedded_guidance=False)
    engine = made.engine(part, made.export(part), (Target.SM89, Target.SM120), profile)
    sizes = {name: tensor.numel() for name, tensor in part.module.named_parameters()}
    stored = (made.export(part).folder / DATA_NAME).stat().st_size
    memory = engine.memory()

    assert memory["Activation"] > 0
    assert memory["Weights"] < stored + 512 * len(sizes) < 2 * sum(sizes.values())
