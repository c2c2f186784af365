"""A byte-level BPE in Gemma's manner: <pad> 0, <eos> 1, <bos> 2, <unk> 3; <bos> is put first; pads on the right.

Trained on captions of the grammar, so that most words are one token; bytes cover everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from train.tiny.captions import ABOVE_BELOW, COLOUR_NAMES, LANGUAGES, LEFT_RIGHT, Names, Scene, caption

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)
INSTRUCTION = ("Draw an emoji scene. ",)  # the "complex human instruction", joined by newlines and put before the prompt


def train_tokenizer(names: list[Names], *, num_captions: int = 60_000, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Deterministic: the captions are drawn with a fixed seed, evenly over languages, so that every language gets its words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rng = np.random.default_rng(0)
    corpus = ["".join(INSTRUCTION)] * 100
    languages = list(LANGUAGES)
    for index in range(num_captions):
        kind = index % 5
        first, second = rng.choice(len(names), size=2, replace=False)
        scene = Scene(
            kind, int(first), int(second) if kind in (LEFT_RIGHT, ABOVE_BELOW) else -1, int(rng.integers(len(COLOUR_NAMES)))
        )
        corpus.append(caption(scene, names, rng, language=languages[int(rng.integers(len(languages)))]))

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
    )
    return tokenizer


def num_instruction_tokens(tokenizer: Tokenizer) -> int:
    """Tokens of the instruction alone, <bos> counted: what diffusers' SanaPipeline measures before it slices."""
    return len(tokenizer.encode("\n".join(INSTRUCTION)).ids)


def encode_captions(tokenizer: Tokenizer, captions: list[str], length: int) -> tuple[np.ndarray, int]:
    """Token ids as inference makes them, for a maximum sequence length of `length` in place of 300.

    Returns ids (n, num_instruction + length - 2) int16, padded with 0, and num_instruction. Of the encoder's outputs, index 0
    and the last length - 1 are the text that the transformer sees. Padding is never attended to (the encoder is causal and
    padding is last; the transformer masks it), so the shorter length changes nothing. Raises ValueError if a caption does not
    fit.
    """
    instruction = "\n".join(INSTRUCTION)
    prefix = num_instruction_tokens(tokenizer)
    width = prefix + length - 2
    ids = np.zeros((len(captions), width), dtype=np.int16)
    for row, encoding in enumerate(tokenizer.encode_batch_fast([instruction + text for text in captions])):
        if len(encoding.ids) > width:
            raise ValueError(f"caption {captions[row]!r}: got {len(encoding.ids)} tokens; expected at most {width}. Raise `length`")
        ids[row, : len(encoding.ids)] = encoding.ids
    return ids, prefix
