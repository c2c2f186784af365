"""A table of tokens on the host: in a file of its own, exactly, and in no graph; what is left computes the same."""

import functools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from tiny_build import PARTS, RANGES, component, quiet, request, runner
from tiny_checkpoint import TEXT_ENCODER, write_checkpoint

from engines.bundle import Bundle
from engines.errors import CheckpointError, ParityError
from engines.golden import Golden
from engines.spec import Precision, Target
from engines.token_table import TABLE_NAME, TENSOR
from export.build import build
from export.components import Component, profiles
from export.linear_nodes import use_linear_plugins
from export.parity import run_onnxruntime
from export.stages import Result, golden_of, parity_of
from export.token_table import TABLE_FILE, with_rows
from export.weights import DATA_NAME, PORTABLE_NAME, TYPED_NAME
from runtime import SanaEngine
from sana_ref.components import TOKEN_TABLE
from sana_ref.weight_only import HOST

IDS = np.random.default_rng(0).integers(0, TEXT_ENCODER.vocab_size, (2, 30))
CASES = {"text": {"input_ids": IDS, "attention_mask": (np.arange(30) < 28).astype(np.int64) * np.ones_like(IDS)}}


@functools.cache
def part(*, on_host: bool, precision: Precision = Precision.BF16) -> Component:
    return replace(component("text_encoder", precision), table=HOST if on_host else None)


@functools.cache
def exported(*, on_host: bool, precision: Precision = Precision.BF16) -> Result:
    return runner().export(part(on_host=on_host, precision=precision))


def graph(name: str, *, on_host: bool = True) -> onnx.GraphProto:
    return onnx.load(exported(on_host=on_host).folder / name, load_external_data=False).graph


@pytest.mark.slow
def test_the_graphs_take_rows():
    for name, kind in ((TYPED_NAME, TensorProto.BFLOAT16), (PORTABLE_NAME, TensorProto.FLOAT)):
        made = graph(name)
        rows, mask = made.input
        assert [each.dim_param or each.dim_value for each in rows.type.tensor_type.shape.dim] == ["batch", "tokens", 48]
        assert (rows.name, rows.type.tensor_type.elem_type, mask.name) == ("inputs_embeds", kind, "attention_mask")
        inside, beside = ({each.name for each in one.initializer} for one in (graph(name, on_host=False), made))
        assert {each for each in inside - beside if each.startswith("encoder.")} == {TOKEN_TABLE}
        counts = [Counter(node.op_type for node in one.node)["Gather"] for one in (graph(name, on_host=False), made)]
        assert counts[0] - counts[1] == 1
    sizes = [(exported(on_host=each).folder / DATA_NAME).stat().st_size for each in (False, True)]
    assert sizes[0] - sizes[1] >= 2 * TEXT_ENCODER.vocab_size * TEXT_ENCODER.hidden_size - 4096  # it was aligned to a page


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP32])
def test_the_file_has_the_components_numbers(precision):
    it = part(on_host=True, precision=precision)
    found = load_file(exported(on_host=True, precision=precision).folder / TABLE_FILE)
    assert found.keys() == {TENSOR}
    assert found[TENSOR].dtype == it.dtype
    assert torch.equal(found[TENSOR], runner().stored(it)(TOKEN_TABLE).to(it.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP32])
def test_onnxruntime_gives_the_same_bits(precision):
    """Whether rows are looked up in the graph or before it, whatever they are multiplied with behind."""
    golden = {case: Golden(inputs=inputs, outputs={}) for case, inputs in CASES.items()}
    expected, got = (
        run_onnxruntime(
            exported(on_host=on_host, precision=precision).folder / PORTABLE_NAME,
            with_rows(part(on_host=on_host, precision=precision), exported(on_host=on_host, precision=precision).folder, golden),
            frugal=False,
        )["text"]["prompt_embeds"]
        for on_host in (False, True)
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_parity_is_held_to_the_model_with_its_table():
    """The golden inputs stay token ids: what looks them up is part of what is checked."""
    made, it = runner(), part(on_host=True)
    reference = made.reference(it, lambda: CASES, {"test": "table"})
    assert golden_of(reference)["text"].inputs.keys() == {"input_ids", "attention_mask"}
    output = parity_of(made.parity(it, exported(on_host=True), reference, ())).outputs["prompt_embeds"]
    assert output.onnxruntime is not None
    assert output.portable_bound is not None
    assert 0 < output.onnxruntime.rms <= output.portable_bound.rms < 0.01 * output.bound.rms


@pytest.mark.slow
def test_a_row_that_is_not_the_models_is_seen(tmp_path):
    """The parity check is of the file's rows."""
    folder = Path(shutil.copytree(exported(on_host=True).folder, tmp_path / "graphs"))
    table = load_file(folder / TABLE_FILE)[TENSOR]
    table[int(IDS[0, 0])] *= 1.05
    save_file({TENSOR: table}, folder / TABLE_FILE)
    made, it = runner(), part(on_host=True)
    reference = made.reference(it, lambda: CASES, {"test": "table"})
    with pytest.raises(ParityError, match="text_encoder, prompt_embeds"):
        made.parity(it, Result(folder=folder, key="spoilt"), reference, ())


def test_profiles_have_rows():
    found = profiles(part(on_host=True), RANGES, instructed_tokens=60, embedded_guidance=False)
    assert found == {
        "inputs_embeds": ((1, 24, 48), (1, 60, 48), (4, 60, 48)),
        "attention_mask": ((1, 24), (1, 60), (4, 60)),
    }


@pytest.mark.slow
def test_an_engine_has_no_table():
    """By what TensorRT says that it needs."""
    memory = []
    for on_host in (False, True):
        it = part(on_host=on_host)
        profile = profiles(it, RANGES, instructed_tokens=60, embedded_guidance=False)
        engine = runner().engine(it, exported(on_host=on_host), (Target.SM89, Target.SM120), profile)
        memory.append(engine.memory()["Weights"])
    assert memory[0] - memory[1] >= 2 * TEXT_ENCODER.vocab_size * TEXT_ENCODER.hidden_size - 512


@pytest.mark.slow
def test_sm90_multiplies_with_the_same_layers():
    """cuBLASLt's nodes go into the graph as they do with a table in it."""
    counts = []
    for on_host in (False, True):
        model = onnx.load(exported(on_host=on_host).folder / TYPED_NAME, load_external_data=False)
        counts.append(use_linear_plugins(model))
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_a_bundle_says_where_its_table_is(tmp_path):
    """And what was verified is what the runtime looks up. Without a table on the host the manifest is as before."""
    found = {}
    for name, weights in (("beside", {"text_encoder_table": "host"}), ("inside", {})):
        build(request(tmp_path / name, components=("text_encoder",), weights=weights), quiet())
        bundle = Bundle.open(tmp_path / name)
        found[name] = bundle.manifest.schema_version, bundle.manifest.token_table_rows, TABLE_NAME in bundle.manifest.files
        with SanaEngine(bundle, backend="onnxruntime") as engine, engine.session("text_encoder") as session:
            found[name] += (session.run(CASES["text"])["prompt_embeds"].tobytes(),)
    assert found["inside"][:3] == (2, 0, False)
    assert found["beside"] == (3, TEXT_ENCODER.vocab_size, True, found["inside"][3])
    assert "token_table_rows" not in (tmp_path / "inside" / "manifest.json").read_text()


@pytest.mark.slow
def test_a_table_that_is_not_finite(tmp_path):
    folder = write_checkpoint(tmp_path / "nan", **PARTS)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith("embed_tokens.weight"))][5, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = request(tmp_path / "out", model=folder, components=("text_encoder",), weights={"text_encoder_table": "host"})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' holds NaN or infinity"):
        build(wanted, quiet())
