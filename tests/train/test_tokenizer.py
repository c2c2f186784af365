"""Training and runtime must see the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from runtime.prompt import PromptTemplate, PromptTokenizer
from train.tiny.sprites import Sprites
from train.tiny.tokenizer import BOS_ID, INSTRUCTION, SPECIAL_TOKENS, encode_captions, num_instruction_tokens


def test_round_trip_and_special_tokens(sprites: Sprites) -> None:
    tokenizer = Tokenizer.from_str(sprites.tokenizer_json)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    for text in ("a cat on a blue background", "两个猫,白色背景", "Zürich §½ \u2603", ""):
        ids = tokenizer.encode(text).ids
        assert ids[0] == BOS_ID
        assert tokenizer.decode(ids) == text


def test_training_selects_what_the_runtime_selects(sprites: Sprites, tmp_path: Path) -> None:
    path, length = tmp_path / "tokenizer.json", 48
    path.write_text(sprites.tokenizer_json, encoding="utf-8")
    template = PromptTemplate(complex_human_instruction="\n".join(INSTRUCTION), max_sequence_length=length)
    captions = ["a cat on a blue background", "an owl above a key", "猫", "x"]
    tokens = PromptTokenizer(path, template).encode(captions)
    tokenizer = Tokenizer.from_str(sprites.tokenizer_json)
    ids, prefix = encode_captions(tokenizer, captions, length)
    assert prefix == num_instruction_tokens(tokenizer) > 2
    np.testing.assert_array_equal(ids, tokens.ids)
    kept = np.concatenate([ids[:, :1], ids[:, prefix - 1 :]], axis=1)
    np.testing.assert_array_equal(kept != 0, tokens.selected_mask == 1)
