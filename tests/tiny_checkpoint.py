"""A checkpoint of untrained networks in the published layout, small enough to be written, loaded and run in a test."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from sana_ref.variants import DC_AE

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # Gemma's, at Gemma's ids
TEXT_CHANNELS = 48
TRANSFORMER = SanaTransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=TEXT_CHANNELS,
)
VAE = replace(
    DC_AE,
    encoder_block_out_channels=(32, 32, 32, 32, 32, 64),
    decoder_block_out_channels=(32, 32, 32, 32, 32, 64),
    encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
)
TEXT_ENCODER = Gemma2Config(
    vocab_size=len(SPECIAL) + 256,
    hidden_size=TEXT_CHANNELS,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=16,
)
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DPM_SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
SCM = {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5}
INSTRUCTION = ["Say it better:", "- with colours", "User Prompt: "]
MAX_SEQUENCE_LENGTH = 24


def byte_tokenizer() -> Tokenizer:
    """A token a byte, <bos> in front: what is needed of a tokenizer, without a trained vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokens["<bos>"])])
    return tokenizer


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Also what starts as zeros or ones is random, so that nothing can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(0, spread, generator=generator)
    return model


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def write_checkpoint(
    folder: Path,
    *,
    transformer: SanaTransformerConfig = TRANSFORMER,
    vae: AutoencoderDCConfig = VAE,
    text_encoder: Gemma2Config = TEXT_ENCODER,
    scheduler: dict[str, Any] = DPM_SOLVER,
    instruction: list[str] | None = INSTRUCTION,
    seed: int = 0,
) -> Path:
    """Write model_index.json, networks, tokenizer and scheduler; return the folder. `instruction` None: the published one."""
    sprint = transformer.guidance_embeds
    index = {
        "_class_name": "SanaSprintPipeline" if sprint else "SanaPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }
    if instruction is not None:
        index["complex_human_instruction"] = instruction
    write_json(folder / "model_index.json", index)
    for name, model, config, class_key in (
        ("transformer", SanaTransformer2DModel(transformer), asdict(transformer), {"_class_name": "SanaTransformer2DModel"}),
        ("vae", AutoencoderDC(vae), asdict(vae), {"_class_name": "AutoencoderDC"}),
        (
            "text_encoder",
            Gemma2Encoder(text_encoder),
            asdict(text_encoder),
            {"model_type": "gemma2", "architectures": ["Gemma2Model"]},
        ),
    ):
        write_json(folder / name / "config.json", class_key | config)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: value.contiguous() for key, value in randomised(model, seed).state_dict().items()}
        save_file(tensors, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    (folder / "tokenizer").mkdir(exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    return folder
