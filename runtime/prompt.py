"""From prompts to token ids: the complex human instruction before the prompt, and the slice that the denoiser sees.

Sana puts an instruction ("Given a user prompt, generate an enhanced prompt ...") before the prompt, lets the text encoder read
both, and keeps the first position (<bos>) and the last L - 1 of them. With n instruction tokens (<bos> included) the text is
padded or cut to S = n + L - 2, so the positions kept are <bos>, the instruction's last token, and L - 2 of the prompt. The prompt
is lower-cased and stripped, the instruction is not. Negative prompts get no instruction: S = L and all positions are kept.

Source: Sana, arXiv:2410.10629, section 3.3; the slice as in diffusers' SanaPipeline. L is 300 for every published model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from engines.errors import CheckpointError, RequestError, SpecError

__all__ = [
    "MAX_PROMPTS",
    "MAX_PROMPT_CHARACTERS",
    "PromptCutWarning",
    "PromptTemplate",
    "PromptTokenizer",
    "Tokens",
    "check_prompts",
]

MAX_PROMPT_CHARACTERS = 100_000  # far past any L; tokenizing more would only keep a server busy
MAX_PROMPTS = 1024  # of one request
_SHOWN = 300  # characters of a cut that a warning shows

PAD, BOS = "<pad>", "<bos>"  # as Gemma names them


class PromptCutWarning(UserWarning):
    """A prompt was longer than the model reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTemplate:
    """What is done to a prompt before it is tokenized. The manifest's `prompt` has the same fields."""

    complex_human_instruction: str = ""  # put before the prompt as it is; "" for none
    max_sequence_length: int = 300  # L, positions that the denoiser sees
    lowercase: bool = True  # lower-case and strip the prompt

    def __post_init__(self) -> None:
        if not 2 <= self.max_sequence_length <= 8192:
            raise SpecError(
                f"max_sequence_length: got {self.max_sequence_length}; expected 2 to 8192 (<bos> and a token at least)."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """A batch for the text encoder, padded on the right.

    ids, mask: (B, S) int64; mask is 1 for tokens, 0 for padding. selected_mask: (B, L) float32, the mask at the positions kept:
    index 0 and the last L - 1 of S.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    selected_mask: NDArray[np.float32]


def check_prompts(prompts: object, *, name: str = "prompts") -> list[str]:
    """`prompts` (a string or a sequence of strings) as a list. Raises RequestError for anything else, for none, or for too many."""
    found = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(found, list | tuple):
        raise RequestError(f"{name}: got {type(prompts).__name__}; expected a string or a list of strings.")
    if not 1 <= len(found) <= MAX_PROMPTS:
        raise RequestError(f"{name}: got {len(found)}; expected 1 to {MAX_PROMPTS} in one request. Split the list.")
    for i, prompt in enumerate(found):
        where = name if isinstance(prompts, str) else f"{name}[{i}]"
        if not isinstance(prompt, str):
            raise RequestError(f"{where}: got {type(prompt).__name__} ({str(prompt)[:50]!r}); expected a string.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise RequestError(f"{where}: got {len(prompt)} characters; expected at most {MAX_PROMPT_CHARACTERS}. Shorten it.")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise RequestError(f"{where}: got half of a surrogate pair, which is not text. Decode the prompt as UTF-8.")
    return list(found)


class PromptTokenizer:
    """A tokenizer.json with a template. Safe to share between threads: it holds no state of a request."""

    def __init__(self, path: Path | str, template: PromptTemplate) -> None:
        """Raises CheckpointError for a file that is missing, not a tokenizer, or one that does not put <bos> first."""
        self.template = template
        self._tokenizer = _load(Path(path))
        self._pad = _token_id(self._tokenizer, PAD, path)
        bos = _token_id(self._tokenizer, BOS, path)
        if (empty := self._tokenizer.encode("").ids) != [bos]:
            raise CheckpointError(
                f"{path}: the empty text became the tokens {empty}; expected [{bos}], {BOS} alone. "
                "The post_processor must put it before every text and nothing behind."
            )
        instruction = template.complex_human_instruction
        self._instruction_tokens = len(self._tokenizer.encode(instruction)) if instruction else 0

    def sequence_length(self, *, negative: bool = False) -> int:
        """S, the number of positions that the text encoder reads."""
        if negative or not self._instruction_tokens:
            return self.template.max_sequence_length
        return self._instruction_tokens + self.template.max_sequence_length - 2

    def encode(self, prompts: Sequence[str], *, negative: bool = False) -> Tokens:
        """Tokenize a batch. `negative`: without the instruction.

        Warns with PromptCutWarning, showing the text that is lost, about each prompt that does not fit.
        """
        template, length = self.template, self.sequence_length(negative=negative)
        prefix = "" if negative else template.complex_human_instruction
        ids, mask = np.full((len(prompts), length), self._pad, np.int64), np.zeros((len(prompts), length), np.int64)
        for row, prompt in enumerate(prompts):
            text = prefix + (prompt.lower().strip() if template.lowercase else prompt)
            encoding = self._tokenizer.encode(text)
            if len(encoding) > length:
                _warn_of_cut(text, encoding, length, template.max_sequence_length, "negative prompt" if negative else "prompt")
            kept = encoding.ids[:length]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
        kept_positions = [0, *range(length - template.max_sequence_length + 1, length)]
        return Tokens(ids=ids, mask=mask, selected_mask=mask[:, kept_positions].astype(np.float32))


def _load(path: Path) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a tokenizer.json.") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception, for JSON that is not a tokenizer
        raise CheckpointError(f"{path}: not a tokenizer ({error}); expected a tokenizer.json of the tokenizers library.") from None
    tokenizer.no_padding()  # a file may come with its own; lengths are decided here
    tokenizer.no_truncation()
    return tokenizer


def _token_id(tokenizer: Tokenizer, token: str, path: Path | str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"{path}: no token {token!r}; expected a tokenizer with {PAD} and {BOS}, as Gemma's.")
    return int(found)


def _warn_of_cut(text: str, encoding: Encoding, length: int, max_sequence_length: int, what: str) -> None:
    lost = text[encoding.offsets[length][0] :]
    shown = lost if len(lost) <= _SHOWN else lost[:_SHOWN] + "…"
    warnings.warn(
        f"{what}: {len(encoding) - length} tokens too long for the {max_sequence_length} that the model reads; cut: {shown!r}",
        PromptCutWarning,
        stacklevel=3,
    )
