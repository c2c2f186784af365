"""sana-tiny's text encoder and sampler, as the config.json files that it ships with. Its other sizes are in configs/."""

from __future__ import annotations

from typing import Any

from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from train.tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID

PX_PER_LATENT = 32
FLOW_SHIFT = 3.0  # as configs/objective/sana.yaml; a test holds the two together

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

TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "tiny": TEXT_ENCODER,
    # As small as the class allows: for tests on a CPU, never shipped.
    "minuscule": TEXT_ENCODER
    | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def make_text_encoder(config: dict[str, Any]) -> Gemma2Encoder:
    return Gemma2Encoder(Gemma2Config.from_json(config))
