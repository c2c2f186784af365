"""The original .pth layout: written here as NVlabs/Sana names its modules, and read back as the same model."""

import collections
from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import TRANSFORMER, randomised, write_checkpoint

from engines.errors import CheckpointError
from sana_ref.checkpoint import load
from sana_ref.transformer import SanaTransformer2DModel

SPRINT = replace(TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")


def original(model):
    """The state dict as the original code would have saved it, spelt out by hand."""
    ours = model.state_dict()
    time = "time_embed" if model.config.guidance_embeds else "time_embed.emb"
    theirs = {
        "x_embedder.proj": "patch_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_embedder.mlp.0": f"{time}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{time}.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "final_layer.linear": "proj_out",
    }
    if model.config.guidance_embeds:
        theirs |= {f"cfg_embedder.mlp.{2 * i}": f"time_embed.guidance_embedder.linear_{i + 1}" for i in (0, 1)}
    out = {f"{name}.{kind}": ours[f"{stem}.{kind}"] for name, stem in theirs.items() for kind in ("weight", "bias")}
    out["attention_y_norm.weight"] = ours["caption_norm.weight"]
    out["final_layer.scale_shift_table"] = ours["scale_shift_table"]
    for i in range(model.config.num_layers):
        block, b = f"transformer_blocks.{i}", f"blocks.{i}"
        out[f"{b}.scale_shift_table"] = ours[f"{block}.scale_shift_table"]
        out[f"{b}.attn.qkv.weight"] = torch.cat([ours[f"{block}.attn1.to_{x}.weight"] for x in "qkv"])
        for kind in ("weight", "bias"):
            out[f"{b}.attn.proj.{kind}"] = ours[f"{block}.attn1.to_out.0.{kind}"]
            out[f"{b}.cross_attn.q_linear.{kind}"] = ours[f"{block}.attn2.to_q.{kind}"]
            out[f"{b}.cross_attn.kv_linear.{kind}"] = torch.cat([ours[f"{block}.attn2.to_{x}.{kind}"] for x in "kv"])
            out[f"{b}.cross_attn.proj.{kind}"] = ours[f"{block}.attn2.to_out.0.{kind}"]
            out[f"{b}.mlp.inverted_conv.conv.{kind}"] = ours[f"{block}.ff.conv_inverted.{kind}"]
            out[f"{b}.mlp.depth_conv.conv.{kind}"] = ours[f"{block}.ff.conv_depth.{kind}"]
        out[f"{b}.mlp.point_conv.conv.weight"] = ours[f"{block}.ff.conv_point.weight"]
        if model.config.qk_norm:
            for x in "qk":
                out[f"{b}.attn.{x}_norm.weight"] = ours[f"{block}.attn1.norm_{x}.weight"]
                out[f"{b}.cross_attn.{x}_norm.weight"] = ours[f"{block}.attn2.norm_{x}.weight"]
    out["y_embedder.y_embedding"] = torch.zeros(300, 48)  # the null text of training
    out["pos_embed"] = torch.zeros(1, 4, 64)
    if model.config.guidance_embeds:
        out["logvar_linear.weight"] = torch.zeros(1, 64)
    return out


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "rest")


def saved(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.mark.parametrize("config", [TRANSFORMER, SPRINT], ids=["sana", "sprint"])
def test_original_layout_is_the_same_model(config, rest, tmp_path):
    model = randomised(SanaTransformer2DModel(config), seed=5)
    path = saved(tmp_path, {"state_dict": original(model), "epoch": 3, "rng_state": {"python": (3, (1, 2))}})
    checkpoint = load(path, components_from=rest, transformer_config=config)
    torch.testing.assert_close(checkpoint.transformer().state_dict(), model.state_dict(), rtol=0, atol=0)
    assert checkpoint.name == "model.pth"
    assert checkpoint.tokenizer_path.is_file()
    assert checkpoint.digest != load(rest).digest
    assert next(checkpoint.vae(torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_config_of_the_other_components_serves_too(rest, tmp_path):
    path = saved(tmp_path, original(SanaTransformer2DModel(TRANSFORMER)))  # without "state_dict" around it
    assert load(path, components_from=rest).transformer_config == TRANSFORMER


def test_older_files_that_are_not_archives(rest, tmp_path):
    torch.save(
        {"state_dict": original(SanaTransformer2DModel(TRANSFORMER))}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    assert load(tmp_path / "old.pth", components_from=rest).transformer().config == TRANSFORMER


def test_config_that_does_not_fit(rest, tmp_path):
    path = saved(tmp_path, original(SanaTransformer2DModel(TRANSFORMER)))
    with pytest.raises(CheckpointError, match="tensors are missing"):
        load(path, components_from=rest, transformer_config="sana_600m_512px")
    with pytest.raises(CheckpointError, match=r"transformer_config: got 'sana_9b'; expected one of sana_600m_512px"):
        load(path, components_from=rest, transformer_config="sana_9b")


def test_unknown_tensors_are_named(rest, tmp_path):
    path = saved(tmp_path, original(SanaTransformer2DModel(TRANSFORMER)) | {"blocks.0.mlp.t_conv.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"no place for, first 'blocks\.0\.mlp\.t_conv\.weight'"):
        load(path, components_from=rest)


def test_the_rest_has_to_come_from_somewhere(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds the transformer alone\. Pass components_from"):
        load(saved(tmp_path, {}))


class RunsCode:
    def __reduce__(self):
        return (collections.deque, ([1],))


def test_pickle_that_asks_for_more_than_tensors(rest, tmp_path):
    with pytest.raises(CheckpointError, match=r"needs more than tensors to be read .*weights_only=True.*can run code"):
        load(saved(tmp_path, {"state_dict": {}, "optimizer": RunsCode()}), components_from=rest)


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_half_a_file(rest, tmp_path, keep):
    path = saved(tmp_path, original(SanaTransformer2DModel(TRANSFORMER)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"without its end.*download it again"):
        load(path, components_from=rest)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_not_a_checkpoint(rest, tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth: (not a readable \.pth|needs more than tensors)"):
        load(tmp_path / "x.pth", components_from=rest)


def test_other_content(rest, tmp_path):
    with pytest.raises(CheckpointError, match=r"got \['epoch'\]; expected 'state_dict'"):
        load(saved(tmp_path, {"epoch": 3}), components_from=rest)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.safetensors", "model"])
def test_other_files(rest, tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"expected a folder, a Hub id, or an original \.pth"):
        load(tmp_path / name, components_from=rest)
