"""Checkpoints from a folder: what is loaded, and how each kind of damage is reported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import (
    EULER,
    INSTRUCTION,
    MAX_SEQUENCE_LENGTH,
    SCM,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    write_json,
)

from engines.errors import CheckpointError
from sana_ref.checkpoint import COMPONENTS, load
from sana_ref.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_ref.scheduler_config import Sampler

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def shard(folder, stem="diffusion_pytorch_model", kind=None):
    """Replace a component's one weights file by two and an index, as published large models have."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    tag = "" if kind is None else f".{kind}"
    weight_map = {}
    for number in (0, 1):
        name = f"{stem}-0000{number + 1}-of-00002{tag}.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / f"{stem}.safetensors.index{tag}.json", {"metadata": {}, "weight_map": weight_map})
    return tensors


def test_folder(whole):
    checkpoint = load(whole)
    assert (checkpoint.name, checkpoint.revision) == ("tiny", None)
    assert checkpoint.transformer_config == TRANSFORMER
    assert checkpoint.vae_config == VAE
    assert checkpoint.text_encoder_config == TEXT_ENCODER
    assert checkpoint.tokenizer_path == whole / "tokenizer" / "tokenizer.json"
    assert checkpoint.sampler == Sampler(scheduler="flow_dpm_solver", flow_shift=3.0, num_steps=20, guidance_scale=4.5)
    assert checkpoint.scheduler_config["flow_shift"] == 3.0
    assert checkpoint.prompt.complex_human_instruction == "\n".join(INSTRUCTION)
    assert checkpoint.prompt.max_sequence_length == MAX_SEQUENCE_LENGTH


def test_models_have_the_files_numbers(whole):
    checkpoint = load(str(whole))
    for model, file in (
        (checkpoint.transformer(), whole / "transformer" / WEIGHTS),
        (checkpoint.vae(torch.bfloat16), whole / "vae" / WEIGHTS),
        (checkpoint.text_encoder(torch.bfloat16), whole / "text_encoder" / "model.safetensors"),
    ):
        assert not model.training
        dtype = next(model.parameters()).dtype
        expected = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_weights_are_mapped_and_not_copied(whole):
    model = load(whole).transformer()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(WEIGHTS)]
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines if "/transformer/" in line[-1]]
    assert mapped
    assert all(any(low <= parameter.data_ptr() < high for low, high in mapped) for parameter in model.parameters())


def test_a_model_can_be_trained_without_changing_the_file(whole):
    model = load(whole).transformer()
    before = load_file(whole / "transformer" / WEIGHTS)["proj_out.weight"]
    with torch.no_grad():
        model.proj_out.weight.add_(1)
    assert model.proj_out.weight.requires_grad
    torch.testing.assert_close(load(whole).transformer().proj_out.weight.detach(), before)


def test_published_instruction_where_none_is_given(folder):
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", {key: value for key, value in index.items() if not key.startswith(("complex", "max"))})
    prompt = load(folder).prompt
    assert prompt.complex_human_instruction == "\n".join(COMPLEX_HUMAN_INSTRUCTION)
    assert prompt.max_sequence_length == 300


@pytest.mark.parametrize("kind", [None, "bf16"])
def test_shards(folder, kind):
    tensors = shard(folder / "transformer", kind=kind)
    checkpoint = load(folder, variant=kind)
    torch.testing.assert_close(checkpoint.state_dict("transformer"), tensors)


def test_variant_is_preferred_where_there_is_one(folder):
    half = {name: tensor.half() for name, tensor in load_file(folder / "transformer" / WEIGHTS).items()}
    save_file(half, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    plain, fp16 = load(folder), load(folder, variant="fp16")
    assert {tensor.dtype for tensor in fp16.state_dict("transformer").values()} == {torch.float16}
    assert {tensor.dtype for tensor in fp16.state_dict("vae").values()} == {torch.float32}
    assert {tensor.dtype for tensor in plain.state_dict("transformer").values()} == {torch.float32}


def test_language_model_head_is_dropped(folder):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": torch.zeros(3, 4)}, file)
    torch.testing.assert_close(load(folder).state_dict("text_encoder"), tensors)


def test_unwanted_components_may_be_missing(folder):
    shutil.rmtree(folder / "text_encoder")
    checkpoint = load(folder, components=("vae",))
    assert checkpoint.vae_config == VAE
    with pytest.raises(CheckpointError, match="was loaded without its text_encoder"):
        checkpoint.text_encoder()


def test_another_autoencoder_of_the_same_latents(folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "lite")
    weights = load_file(next((tmp_path / "lite").glob("*.safetensors")))
    save_file({name: 2 * tensor for name, tensor in weights.items()}, next((tmp_path / "lite").glob("*.safetensors")))
    checkpoint, own = load(folder, vae=tmp_path / "lite"), load(folder)
    name = next(iter(weights))
    torch.testing.assert_close(checkpoint.state_dict("vae")[name], 2 * own.state_dict("vae")[name])
    assert checkpoint.component_digest("transformer") == own.component_digest("transformer")
    assert checkpoint.digest != own.digest


def test_autoencoder_of_other_latents_is_refused(folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    write_json(tmp_path / "other/config.json", config | {"scaling_factor": 0.5})
    with pytest.raises(CheckpointError, match=r"scaling_factor 0\.5; expected .* knows no other latents"):
        load(folder, vae=tmp_path / "other")
    with pytest.raises(CheckpointError, match="nowhere"):
        load(folder, vae=tmp_path / "nowhere")


def test_digest_changes_with_content_and_nothing_else(folder, tmp_path):
    digest = load(folder).digest
    assert load(shutil.copytree(folder, tmp_path / "elsewhere")).digest == digest
    (folder / "README.md").write_text("not part of it")
    assert load(folder).digest == digest
    changed = []
    edit(folder / "model_index.json", max_sequence_length=20)
    changed.append(load(folder).digest)
    edit(folder / "scheduler" / "scheduler_config.json", flow_shift=4.0)
    changed.append(load(folder).digest)
    tensors = load_file(folder / "vae" / WEIGHTS)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + 1e-3
    save_file(tensors, folder / "vae" / WEIGHTS)
    changed.append(load(folder).digest)
    assert len({digest, *changed}) == 4


def test_digest_of_one_network(folder):
    before = {name: load(folder).component_digest(name) for name in COMPONENTS}
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    after = {name: load(folder).component_digest(name) for name in COMPONENTS}
    assert [name for name in COMPONENTS if before[name] != after[name]] == ["vae"]


# Damage. Each message says what was got, what was expected, and what to do.


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder; expected a path that exists, or owner/name"):
        load(tmp_path / "none")


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_missing_config(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file\. .* download complete|model_index\.json: no such file"):
        load(folder)


def test_a_bundle_is_no_checkpoint(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"got a bundle, .* expected a checkpoint. A bundle draws: sana generate"):
        load(tmp_path)


def test_missing_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    checkpoint = load(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        _ = checkpoint.tokenizer_path


def test_config_is_not_json(folder):
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vae/config\.json: cannot be read as JSON"):
        load(folder)


def test_unsupported_config_names_its_file(folder):
    edit(folder / "transformer" / "config.json", qk_nrm="l2")
    with pytest.raises(CheckpointError, match=r"transformer/config\.json: .*unknown key 'qk_nrm'; did you mean 'qk_norm'"):
        load(folder)


def test_another_kind_of_model(folder):
    edit(folder / "model_index.json", transformer=["diffusers", "SanaVideoTransformer3DModel"])
    with pytest.raises(CheckpointError, match=r"transformer is .*SanaVideoTransformer3DModel.*expected SanaTransformer2DModel"):
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder, size):
    file = folder / "transformer" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=rf"got {len(content[:size])} bytes.* expected .*download it again"):
        load(folder)


def test_weights_that_are_something_else(folder):
    (folder / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load(folder)


def test_missing_weights(folder):
    (folder / "vae" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=rf"vae: holds no weights; expected {WEIGHTS}"):
        load(folder)


def test_missing_component(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=r"vae/config\.json: no such file"):
        load(folder)


def test_missing_shard(folder):
    shard(folder / "transformer")
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 weight files are missing: diffusion_pytorch_model-00002-of-00002"):
        load(folder)


def test_index_that_leads_elsewhere(folder):
    shard(folder / "transformer")
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    write_json(index, {"weight_map": {"proj_out.weight": "../vae/diffusion_pytorch_model.safetensors"}})
    with pytest.raises(CheckpointError, match=r"expected the bare name of a \.safetensors file beside it"):
        load(folder)


def test_index_of_other_shards(folder):
    shard(folder / "transformer")
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_json(index, {"weight_map": weight_map | {"not.there": next(iter(weight_map.values()))}})
    with pytest.raises(CheckpointError, match=r"names the tensor 'not\.there', which no file holds"):
        load(folder)


def test_pickle_is_refused(folder):
    (folder / "vae" / WEIGHTS).unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"got only diffusion_pytorch_model\.bin, a pickle, which can run code"):
        load(folder)


def test_variant_that_has_to_be_named(folder):
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"got diffusion_pytorch_model\.bf16\.safetensors; expected .* Pass variant='bf16'"):
        load(folder)


def test_variant_that_is_not_there(whole):
    with pytest.raises(CheckpointError, match="got variant='fp16', and no component has files of it"):
        load(whole, variant="fp16")


def test_config_that_does_not_fit(folder):
    edit(folder / "transformer" / "config.json", caption_channels=32)
    with pytest.raises(
        CheckpointError,
        match=r"'caption_projection\.linear_1\.weight' has shape \(64, 48\); expected \(64, 32\), as config\.json",
    ):
        load(folder)


def test_tensors_that_are_missing_or_left_over(folder):
    edit(folder / "transformer" / "config.json", num_layers=3)
    with pytest.raises(CheckpointError, match=r"19 tensors are missing, first 'transformer_blocks\.2\."):
        load(folder)
    edit(folder / "transformer" / "config.json", num_layers=1)
    with pytest.raises(CheckpointError, match=r"got 19 tensors that .* no place for, first 'transformer_blocks\.1\..* \(nearest: "):
        load(folder)


def test_misspelt_tensor_names_the_nearest(folder):
    tensors = load_file(folder / "transformer" / WEIGHTS)
    tensors["caption_norms.weight"] = tensors.pop("caption_norm.weight")
    save_file(tensors, folder / "transformer" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"first 'caption_norm\.weight' .*nearest: 'caption_norms\.weight'"):
        load(folder)


def test_quantized_weights(folder):
    tensors = load_file(folder / "transformer" / WEIGHTS)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, folder / "transformer" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"'proj_out\.weight' is stored as I8; expected one of F64"):
        load(folder)


def test_a_config_of_quantized_weights(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "modelopt"}}))
    with pytest.raises(CheckpointError, match=r"config\.json: got a quantization_config: .* would be quantized again"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "got 'DDIMScheduler'; expected one of FlowMatchEuler"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas: got False; expected True"),
        ({"solver_order": 3}, "solver_order: got 3; expected 2"),
        (EULER | {"use_dynamic_shifting": True}, "use_dynamic_shifting: got True"),
    ],
)
def test_scheduler_that_would_draw_other_pictures(folder, changes, message):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        (EULER | {"shift": 6}, Sampler(scheduler="flow_euler", flow_shift=6.0, num_steps=20, guidance_scale=4.5)),
        (SCM, Sampler(scheduler="scm", flow_shift=1.0, num_steps=2, guidance_scale=4.5)),
    ],
)
def test_schedulers(folder, config, sampler):
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    assert load(folder).sampler == sampler


def test_own_defaults(folder):
    edit(folder / "model_index.json", num_inference_steps=12, guidance_scale=3)
    assert load(folder).sampler == Sampler(scheduler="flow_dpm_solver", flow_shift=3.0, num_steps=12, guidance_scale=3.0)
    edit(folder / "model_index.json", guidance_scale="a lot")
    with pytest.raises(CheckpointError, match=r"got 12, 'a lot', 3\.0; expected numbers"):
        load(folder)


def test_bad_prompt_settings(folder):
    edit(folder / "model_index.json", complex_human_instruction="one string")
    with pytest.raises(CheckpointError, match="expected a list of strings and an integer"):
        load(folder)


@pytest.mark.parametrize("arguments", [{"revision": COMMIT}, {"components_from": "x/y"}, {"transformer_config": "sana_600m_512px"}])
def test_arguments_that_do_not_go_with_a_folder(whole, arguments):
    with pytest.raises(CheckpointError, match=r"Leave (it|them) out"):
        load(whole, **arguments)
