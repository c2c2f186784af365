"""From texts to a plan of the text encoder: what is seen, that smoothing helps, the same bits twice, and layers without a range."""

import math
from pathlib import Path

import pytest
import torch
from quantized_text import DOWN, GATE_UP, OUT, QKV
from safetensors.torch import load_file, save_file
from tiny_build import quiet
from tiny_checkpoint import write_checkpoint

from engines.errors import CheckpointError, SpecError
from engines.store import Store
from export import text_calibration
from export.calibration_report import CalibrationReport
from export.quantization_plan import PLAN
from export.recipe import load_recipe
from export.text_calibration import calibrate_text, texts_of
from runtime.prompt import PromptTokenizer
from sana_ref import checkpoint as checkpoints
from sana_ref.quantization import load_plan
from sana_ref.quantized import InputRanges, QuantizedLinears

KEYS = ["text_encoder=w8a8", "calibration.num_prompts=1", "calibration.rows=40"]
TEXTS = ("a cat", "a dog", "ein Hund")


def write(folder: Path) -> Path:
    path = write_checkpoint(folder)
    (path / "calibration_prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoint"))


def calibrated(folder, store, *keys):
    return calibrate_text(checkpoints.load(folder), load_recipe("int8", [*KEYS, *keys]), store=store, progress=quiet())


def planned(folder, store, *keys):
    return load_plan(calibrated(folder, store, *keys) / PLAN)


def test_four_texts_for_each_prompt_where_there_are_so_many(folder, tmp_path):
    checkpoint = checkpoints.load(folder)
    assert texts_of(checkpoint, load_recipe("int8", KEYS)) == TEXTS
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(map(str, range(20))), encoding="utf-8")
    assert len(texts_of(checkpoint, load_recipe("int8", ["calibration.num_prompts=3", f"calibration.prompts={file}"]))) == 12
    with pytest.raises(SpecError, match="got 3 calibration prompts; expected 4"):
        texts_of(checkpoint, load_recipe("int8", ["calibration.num_prompts=4"]))


def ranges(folder, texts=((TEXTS, False), (("",), True))):
    """By hand: each text alone, as long as it is, so without padding."""
    checkpoint = checkpoints.load(folder)
    tokenizer = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt)
    encoder = checkpoint.text_encoder(torch.float32, "cpu").eval()
    with torch.inference_mode(), InputRanges(encoder) as found:
        for several, negative in texts:
            tokens = tokenizer.encode(several, negative=negative)
            for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
                encoder(torch.from_numpy(ids[None, mask > 0]), torch.ones(1, int(mask.sum()), dtype=torch.int64))
    return found.largest()


def test_scales_are_of_tokens_and_not_of_padding(folder, store):
    plan = planned(folder, store, "text_encoder_smoothquant=null")
    assert not plan.tensors
    wanted = ranges(folder)
    assert plan.layers.keys() == wanted.keys()
    for group, layer in plan.layers.items():
        assert layer.input_scale == pytest.approx(wanted[group] / 127, rel=1e-4)


def error_of(folder, plan):
    """Of the states of a text, squared, of their own square."""
    checkpoint = checkpoints.load(folder)
    tokens = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt).encode(["a cat and a dog"])
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    encoder = checkpoint.text_encoder(torch.float32, "cpu").eval()
    with torch.inference_mode():
        exact = encoder(ids, mask)[mask > 0]
        with QuantizedLinears(encoder, plan):
            got = encoder(ids, mask)[mask > 0]
    return float((got - exact).square().sum() / exact.square().sum())


@pytest.mark.slow
def test_outliers_cost_little_with_smoothing(folder, store, tmp_path):
    """A channel of a norm that is 30 times as large as all others, as transformers have them; k, q and v multiply it by little."""
    other = write(tmp_path / "outlier")
    file = other / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        for norm in ("input_layernorm", "pre_feedforward_layernorm"):
            tensors[f"layers.{layer}.{norm}.weight"][7] = 29.0
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            tensors[f"layers.{layer}.{name}.weight"][:, 7] /= 30
    save_file(tensors, file, metadata={"format": "pt"})
    plain, smoothed = (
        error_of(other, planned(other, store, f"text_encoder_smoothquant={exponent}")) for exponent in ("null", "0.5")
    )
    assert smoothed < 0.3 * plain
    assert error_of(folder, planned(folder, store)) < 0.01


def test_the_same_bits_twice_and_a_stopped_one_goes_on(folder, store, tmp_path, monkeypatch):
    checkpoint, recipe = checkpoints.load(folder), load_recipe("int8", KEYS)
    first, progress = calibrate_text(checkpoint, recipe, store=store, progress=quiet()), quiet()
    other = Store(tmp_path / "other")
    observe, seen = text_calibration._observe_text, []

    def stops(*arguments):
        seen.append(arguments[2])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return observe(*arguments)

    monkeypatch.setattr(text_calibration, "_observe_text", stops)
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(checkpoint, recipe, store=other, progress=quiet())
    second = calibrate_text(checkpoint, recipe, store=other, progress=quiet())
    assert seen == [*TEXTS, TEXTS[2], ""]
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    assert calibrate_text(checkpoint, recipe, store=other, progress=progress) == second
    assert progress.stages == []
    report = CalibrationReport.model_validate_json((first / "calibration.json").read_bytes())
    kinds = [group.removeprefix("layers.0") for group in (QKV, OUT, GATE_UP, DOWN)]
    assert [layer.group for layer in report.layers] == [f"layers.{number}{kind}" for number in range(2) for kind in kinds]


@pytest.mark.slow
def test_what_changes_a_plan(folder, store):
    keep, smoother = "text_encoder_keep=[layers.1.mlp.down_proj]", "text_encoder_smoothquant=0.6"
    made = {calibrated(folder, store, *keys) for keys in ([], ["method=mse"], ["calibration.rows=50"], [keep], [smoother])}
    assert len(made) == 5
    for key in ("text_encoder_table=int8", "keep=['*']", "low_rank=2", "awq=[0.5]", "calibration.seed=7"):
        assert calibrated(folder, store, key) in made


def broken(folder, name, value):
    folder = write(folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_layer_whose_activations_are_all_zero_is_named_and_can_be_kept(store, tmp_path):
    folder = broken(tmp_path / "zero", "layers.1.mlp.up_proj.weight", 0.0)
    words = r"layers\.1\.mlp\.down_proj: activations have a range of 0 in all 4 runs.*\(text_encoder_keep in the recipe\)"
    with pytest.raises(CheckpointError, match=words):
        planned(folder, store)
    assert len(planned(folder, store, "text_encoder_keep=[layers.1.mlp.down_proj]").layers) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(store, tmp_path, value):
    folder = broken(tmp_path / "bad", "layers.0.post_attention_layernorm.weight", value)
    words = r"^layers\.0\.post_attention_layernorm\.weight: got NaN or infinity in a weight"
    with pytest.raises(CheckpointError, match=words):
        planned(folder, store)


def test_a_layer_whose_activations_are_not_finite_is_named(store, tmp_path):
    """3e38 times any number above 1 is infinity."""
    folder = broken(tmp_path / "bad", "layers.0.post_attention_layernorm.weight", 3e38)
    words = r"layers\.0\.mlp\.to_gate_up: activations reach (inf|nan) in channel \d+ at the text 'a cat'.*Mend"
    with pytest.raises(CheckpointError, match=words):
        planned(folder, store)


def test_a_weight_of_zeros_is_named(store, tmp_path):
    folder = broken(tmp_path / "weight", "layers.0.mlp.down_proj.weight", 0.0)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight: got a range of 0"):
        planned(folder, store)
