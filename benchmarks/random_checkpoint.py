"""A checkpoint of a published variant with random weights: for what a build or a step takes, where the numbers do not matter.

    python benchmarks/random_checkpoint.py --variant sana_1600m_1024px --out /tmp/random

The transformer in its published precision, Gemma-2-2B and DC-AE in bf16, in shards, written tensor by tensor: no network is ever in
memory. Weights keep activations near 1, so that nothing overflows and errors are those of a trained model in kind. The tokenizer is
small and trained on the published instruction, so that texts are about as many tokens long as with Gemma's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from sana_ref.autoencoder import AutoencoderDC
from sana_ref.build import empty
from sana_ref.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel
from sana_ref.variants import DC_AE, GEMMA_2_2B, VARIANTS, Variant

SHARD_BYTES = 2 << 30
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # Gemma's, at Gemma's ids
BIAS = 0.02  # standard deviation
STORED = {torch.float16: "F16", torch.bfloat16: "BF16"}
SCHEDULERS: Mapping[bool, Callable[[Variant], dict[str, Any]]] = {
    False: lambda variant: {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": variant.flow_shift,
    },
    True: lambda variant: {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5},
}


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """fp32. Matrices and kernels by their fan-in, tables as they are initialised, norms as they start, biases small."""
    if "norm" in name and name.endswith("weight"):
        return torch.zeros(shape) if "layernorm" in name or name == "norm.weight" else torch.ones(shape)  # Gemma's is 1 + weight
    tensor = torch.randn(shape, generator=generator)
    if name.endswith("embed_tokens.weight"):
        return tensor.mul_(BIAS)
    if len(shape) == 1:
        return tensor.mul_(BIAS)
    fan_in = shape[-1] if name.endswith("scale_shift_table") else shape[1:].numel()
    return tensor.mul_(fan_in**-0.5)


def write_weights(model: nn.Module, folder: Path, stem: str, dtype: torch.dtype, seed: int) -> None:
    """Safetensors shards with their index, in the model's order."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        num_bytes = tensor.numel() * dtype.itemsize
        if size and size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.shape
        size += num_bytes
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, dtype, generator)
        print(f"{folder.name}/{file}: {(folder / file).stat().st_size / 1e9:.2f} GB", flush=True)
    if len(shards) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_shard(file: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, generator: torch.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": STORED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            sink.write(random_tensor(name, shape, generator).to(dtype).view(torch.uint8).numpy().data)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def small_tokenizer() -> Tokenizer:
    """Byte-level BPE of at most 1000 tokens, with Gemma's special ones."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(COMPLEX_HUMAN_INSTRUCTION, trainer)
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def write_random_checkpoint(
    variant: Variant, out: Path, seed: int = 0, *, small_text_encoder: bool = False, text_encoder: Gemma2Config = GEMMA_2_2B
) -> None:
    """Write the whole checkpoint to the folder `out`. small_text_encoder: one layer of it, the tokenizer's vocabulary."""
    tokenizer = small_tokenizer()
    text_config = text_encoder
    if small_text_encoder:
        text_config = replace(text_config, num_hidden_layers=1, vocab_size=tokenizer.get_vocab_size())
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant.weights]
    sprint = variant.transformer.guidance_embeds
    scheduler = SCHEDULERS[sprint](variant)
    write_json(
        out / "model_index.json",
        {
            "_class_name": "SanaSprintPipeline" if sprint else "SanaPipeline",
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "Gemma2Model"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],  # Gemma's class would cut words in Gemma's way
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderDC"],
        },
    )
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    (out / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer" / "tokenizer.json"))
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    write_json(out / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    parts: tuple[tuple[str, str, Any, Callable[[], nn.Module], torch.dtype], ...] = (
        ("transformer", "diffusion_pytorch_model", variant.transformer, lambda: SanaTransformer2DModel(variant.transformer), dtype),
        ("vae", "diffusion_pytorch_model", DC_AE, lambda: AutoencoderDC(DC_AE), torch.bfloat16),
        ("text_encoder", "model", text_config, lambda: Gemma2Encoder(text_config), torch.bfloat16),
    )
    for number, (name, stem, config, make, stored) in enumerate(parts):
        extra = {"model_type": "gemma2"} if name == "text_encoder" else {}
        write_json(out / name / "config.json", asdict(config) | extra)
        write_weights(empty(make), out / name, stem, stored, seed + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small-text-encoder", action="store_true", help="one layer: to time the denoiser and the decoder alone")
    options = parser.parse_args()
    write_random_checkpoint(VARIANTS[options.variant], options.out, options.seed, small_text_encoder=options.small_text_encoder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
