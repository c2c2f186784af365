"""A checkpoint of random weights is one that others load too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_build import PARTS
from transformers import AutoTokenizer

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import write_random_checkpoint
from runtime.prompt import PromptTokenizer
from sana_ref.checkpoint import load
from sana_ref.variants import VARIANTS


def test_its_tokens_are_the_same_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a peer would read another text, longer by half."""
    monkeypatch.setattr(random_checkpoint, "DC_AE", PARTS["vae"])
    encoder = replace(PARTS["text_encoder"], vocab_size=1000)
    variant = replace(VARIANTS["sana_600m_1024px"], transformer=PARTS["transformer"])
    write_random_checkpoint(variant, tmp_path, text_encoder=encoder)
    checkpoint = load(tmp_path)
    text = "2 lighthouses at dusk"
    ours = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt).encode([text])
    instructed = checkpoint.prompt.complex_human_instruction + text
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(instructed, padding="max_length", max_length=ours.ids.shape[1])
    assert theirs["input_ids"] == ours.ids[0].tolist()
    assert theirs["attention_mask"] == ours.mask[0].tolist()
