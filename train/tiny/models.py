"""The sizes of sana-tiny, as the config.json files that it ships with, and its modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID

PX_PER_LATENT = 32
BUCKETS: dict[str, tuple[int, int]] = {
    "256x256": (256, 256),
    "320x192": (320, 192),
    "192x320": (192, 320),
    "320x320": (320, 320),
}  # w, h
BUCKET_WEIGHTS = {"256x256": 0.7, "320x192": 0.1, "192x320": 0.1, "320x320": 0.1}
AE_BUCKETS = {"256x256": 0.75, "320x192": 0.25}  # convolutions need no more: the attention meets two numbers of tokens
FLOW_SHIFT = 2.0  # 64 tokens: less than the 3.0 of 1024 tokens, since a smaller latent is drowned by less noise

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2,
    "decoder_block_types": ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2,
    "encoder_block_out_channels": [32, 64, 64, 128, 128, 128],
    "decoder_block_out_channels": [32, 64, 128, 128, 128, 256],
    "encoder_layers_per_block": [0, 1, 1, 1, 1, 1],  # 0: straight to half the resolution, as DC-AE-Lite
    "decoder_layers_per_block": [0, 2, 2, 2, 2, 1],
    "encoder_qkv_multiscales": [[], [], [], [], [], [5]],
    "decoder_qkv_multiscales": [[], [], [], [], [], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 7,
    "attention_head_dim": 32,
    "num_layers": 8,
    "num_cross_attention_heads": 7,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 224,
    "caption_channels": 192,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 8,  # latent cells of 256 px
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": 1.0,  # sinusoid positions, as the 2K models: left and right are learned in fewer steps
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1.0,
}
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 32,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "bos_token_id": BOS_ID,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": FLOW_SHIFT,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}

# As small as the classes allow: for tests and smoke runs on a CPU, never shipped.
MINUSCULE: dict[str, dict[str, Any]] = {
    "vae": VAE
    | {
        "encoder_block_out_channels": [8, 8, 8, 8, 32, 32],
        "decoder_block_out_channels": [8, 8, 8, 8, 32, 32],
        "decoder_layers_per_block": [0, 1, 1, 1, 1, 1],
    },
    "transformer": TRANSFORMER
    | {
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_dim": 64,
        "caption_channels": 32,
    },
    "text_encoder": TEXT_ENCODER
    | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
}
TINY: dict[str, dict[str, Any]] = {"vae": VAE, "transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER}


def make_vae(config: dict[str, Any]) -> AutoencoderDC:
    return AutoencoderDC(AutoencoderDCConfig.from_json(config))


def make_text_encoder(config: dict[str, Any]) -> Gemma2Encoder:
    return Gemma2Encoder(Gemma2Config.from_json(config))


def make_transformer(config: dict[str, Any]) -> SanaTransformer2DModel:
    """Initialised as Sana: blocks begin near the identity, the predicted velocity at zero."""
    model = SanaTransformer2DModel(SanaTransformerConfig.from_json(config))
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in model.named_parameters():
        if name.startswith(("time_embed", "caption_projection")) and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.startswith("proj_out") or ("attn2.to_out" in name and parameter.ndim == 2):
            nn.init.zeros_(parameter)
    return model


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where there are matrix units for it, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
