"""Fake bundles whose tokenizer the C++ runtime reads."""

from __future__ import annotations

import json
from pathlib import Path

import fakes
import pytest

from engines.bundle import PromptInfo

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
