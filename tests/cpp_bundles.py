"""Fake bundles whose tokenizer the C++ runtime reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest

from engines.bundle import PromptInfo, ScheduleInfo

_save_words = fakes.save_fake_tokenizer


def save_letters(path: Path) -> None:
    """A tokenizer of single letters, in place of the fake's whole words."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "▁", "an", "▁a"]
    _save_words(path)
    document = json.loads(path.read_text())
    del document["pre_tokenizer"]
    document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [["a", "n"], ["▁", "a"]]
    document["model"] = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>", "fuse_unk": True}
    path.write_text(json.dumps(document))


def letters_bundle(folder: Path, **options: object) -> Path:
    """fakes.write_fake_bundle with that tokenizer, and an instruction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "save_fake_tokenizer", save_letters)
        prompt = PromptInfo(complex_human_instruction="draw ", max_sequence_length=fakes.LENGTH)
        return fakes.write_fake_bundle(folder, **{"prompt": prompt} | options).path


def sprint_bundle(folder: Path, **options: object) -> Path:
    """One whose denoiser takes the guidance scale and fresh noise."""
    text, shapes = fakes.GRAPHS["denoiser"]
    text = text.replace("prompt_mask)", f"prompt_mask, float[1] guidance_scale, float[B, {fakes.LATENT_CHANNELS}, h, w] noise)")
    text = text.replace(
        "v = ReduceSum <keepdims = 0> (weighted, zero)",
        "u = ReduceSum <keepdims = 0> (weighted, zero)\n v = Mul (u, guidance_scale)",
    )
    text = text.replace("next_latents = Add (ab, c)", "n = Mul (c_noise, noise)\n abc = Add (ab, c)\n next_latents = Add (abc, n)")
    plain = fakes.fake_inputs

    def fake_inputs(component: Any, **kwargs: Any) -> Any:
        inputs = plain(component, **kwargs)
        more = {"guidance_scale": np.ones(1, np.float32), "noise": inputs["previous"]} if component == "denoiser" else {}
        return inputs | more

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fakes.GRAPHS, "denoiser", (text, shapes))
        patch.setattr(fakes, "fake_inputs", fake_inputs)
        schedule = ScheduleInfo(scheduler="scm", num_inference_steps=3, guidance_scale=4.5, max_timestep=1.5)
        return letters_bundle(folder, **{"schedule": schedule, "guidance_embeds": True} | options)
