"""What narrow weights of the text's components cost: the words, and that only those weights change."""

import json
from pathlib import Path

import pytest
import torch
from tiny_build import tiny

from benchmarks.text_weights import main, measure, parse_formats, quantize
from engines.errors import SpecError
from sana_ref.components import TOKEN_TABLE
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import groups_of
from sana_ref.quantized import QuantizedLinears, uniform_plan

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"


def test_words():
    assert parse_formats("int4:int8") == {"text_encoder": "int4", "text_projection": "int8"}
    assert parse_formats("none:fp8") == {"text_projection": "fp8"}
    assert parse_formats("int8/int4:none") == {"text_encoder": "int8", "text_encoder_table": "int4"}
    assert parse_formats("none/host:int8") == {"text_encoder_table": "host", "text_projection": "int8"}


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("int3:int8", "got 'int3' in 'int3:int8'; did you mean 'int8'"),
        ("int4", "got 'int4'; expected two"),
        ("int8/hos:int8", "got 'hos' in 'int8/hos:int8'; did you mean 'host'"),
        ("host:int8", "got 'host' in 'host:int8'"),
        ("int8/int8:host", "got 'host' in 'int8/int8:host'"),
    ],
)
def test_wrong_words(word, words):
    with pytest.raises(SpecError, match=words):
        parse_formats(word)


def test_what_changes():
    exact, changed = SanaReference(tiny()), SanaReference(tiny())
    quantize(changed, {"text_encoder": "int4"})
    for name, tensor in changed.text_encoder.named_parameters():
        assert torch.equal(tensor, exact.text_encoder.get_parameter(name)) == ("norm" in name)
    before = dict(exact.denoiser.transformer.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in changed.denoiser.transformer.named_parameters())
    quantize(changed, {"text_projection": "int8"})
    unlike = {name for name, tensor in changed.denoiser.transformer.named_parameters() if not torch.equal(tensor, before[name])}
    assert {name.split(".", 2)[-1] for name in unlike if name.startswith("transformer_blocks.")} == {
        "attn2.to_k.weight",
        "attn2.to_v.weight",
    }
    assert "caption_projection.linear_1.weight" in unlike


def test_a_table_on_the_host_is_rounded_to_16_bits():
    exact, changed = SanaReference(tiny()), SanaReference(tiny())
    quantize(changed, {"text_encoder": "int8", "text_encoder_table": "host"})
    before, after = (each.text_encoder.get_parameter(TOKEN_TABLE) for each in (exact, changed))
    assert torch.equal(after, before.bfloat16().float())
    layer = "encoder.layers.0.mlp.up_proj.weight"
    assert not torch.equal(changed.text_encoder.get_parameter(layer), exact.text_encoder.get_parameter(layer))


def test_measures():
    exact = [torch.tensor([[3.0, 4.0], [0.0, 1.0]])]
    assert measure(exact, exact) == {
        "embedding_rms": 0,
        "embedding_cosine": pytest.approx(1),
        "embedding_least_cosine": pytest.approx(1),
    }
    got = measure(exact, [torch.tensor([[3.0, 4.0], [1.0, 0.0]])])
    assert got["embedding_rms"] == pytest.approx((2 / 26) ** 0.5)
    assert (got["embedding_cosine"], got["embedding_least_cosine"]) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))


@pytest.mark.slow
def test_the_command(capsys, tmp_path):
    out = tmp_path / "out.json"
    assert main(["--model", str(MODEL), "--formats", "int8:int8", "--captions", "1", "--pictures", "0", "--out", str(out)]) == 0
    assert "int8:int8: embeddings 0." in capsys.readouterr().out
    assert out.is_file()
    assert main(["--model", str(tiny()), "--formats", "int8:int8", "--pictures", "0"]) == 1
    assert "held_out_captions.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_format_that_was_measured_is_kept(tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--model", str(MODEL), "--captions", "1", "--pictures", "0", "--out", str(out), "--formats"]
    assert main([*words, "int8:none"]) == 0
    record = json.loads(out.read_text())
    record["formats"]["int8:none"]["embedding_rms"] = 0.123
    out.write_text(json.dumps(record))
    assert main([*words, "int8:none,int4:none"]) == 0
    assert "int8:none: embeddings 12.30% off" in capsys.readouterr().out
    assert json.loads(out.read_text())["formats"].keys() == {"int8:none", "int4:none"}
    out.write_text(json.dumps({**record, "captions": 7}))
    assert main([*words, "int8:none"]) == 0
    assert "12.30%" not in capsys.readouterr().out


def test_activations_in_8_bits():
    """Planned layers compute as planned, the table has int8 weights, and nothing else changes; without a plan it is refused."""
    assert parse_formats("w8a8/int4:none") == parse_formats("w8a8-unsmoothed/int4:none")
    assert parse_formats("w8a8/int4:none") == {"text_encoder": "w8a8", "text_encoder_table": "int4"}
    with pytest.raises(SpecError, match="got 'w8a8' in 'int8:w8a8'"):
        parse_formats("int8:w8a8")
    exact, changed = SanaReference(tiny()), SanaReference(tiny())
    with pytest.raises(SpecError, match="got w8a8 without a plan"):
        quantize(changed, {"text_encoder": "w8a8"})
    plan = uniform_plan("int8", groups_of(name for name, _ in exact.text_encoder.encoder.named_parameters()))
    quantize(changed, {"text_encoder": "w8a8"}, plan)
    for name, tensor in changed.text_encoder.encoder.named_parameters():
        assert torch.equal(tensor, exact.text_encoder.get_parameter(name)) == ("embed_tokens" not in name)
    (want, _), (got, _) = (each.encode_prompts(["a cat"]) for each in (exact, changed))
    with QuantizedLinears(changed.text_encoder.encoder.encoder, plan):
        again = changed.text_encoder.encoder(*(torch.from_numpy(each) for each in tokens(changed)))
    assert torch.equal(got, again)
    assert 1e-3 < (got - want).norm() / want.norm() < 0.1


def tokens(reference):
    found = reference.tokenizer.encode(["a cat"])
    return found.ids, found.mask
