"""Tokens as diffusers' SanaPipeline makes them, and what is said about prompts that do not fit or are not text."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from engines.errors import CheckpointError, RequestError, SpecError
from runtime.prompt import PromptCutWarning, PromptTemplate, PromptTokenizer, check_prompts

CHI = ["Given a User Prompt, Enhance it:", "- like This", "User Prompt: "]
PROMPTS = ["A Red Apple ", "", "   ", "a cat\nand ünïcode 🍎", "one two three four five six seven", "x" * 40]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Characters as tokens, spaces as ▁, like Gemma's normalizer: offsets must survive it."""
    characters = sorted(set("".join([*CHI, *PROMPTS]).replace(" ", "▁") + "▁" + "abcdefghijklmnopqrstuvwxyz"))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *characters])}
    merges = [("a", "▁"), ("t", ":")]
    vocabulary |= {"a▁": len(vocabulary), "t:": len(vocabulary) + 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.enable_truncation(5)  # as published files have it; must be ignored
    tokenizer.enable_padding(length=9)
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(out))
    return out


def diffusers_tokens(path: Path, prompts: list[str], chi: list[str] | None, length: int):
    """What diffusers feeds its text encoder, and the mask after its selection."""
    from diffusers import SanaPipeline
    from transformers import PreTrainedTokenizerFast

    fed = {}

    def text_encoder(ids, attention_mask):
        fed.update(ids=ids.numpy(), mask=attention_mask.numpy())
        return (torch.zeros(1),)

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=text_encoder)
    pipeline._text_preprocessing = lambda text, clean_caption: SanaPipeline._text_preprocessing(pipeline, text, clean_caption)
    SanaPipeline._get_gemma_prompt_embeds(pipeline, prompts, "cpu", torch.float32, False, length, chi)
    return fed["ids"], fed["mask"], fed["mask"][:, [0, *range(-length + 1, 0)]]


@pytest.mark.slow
@pytest.mark.parametrize("length", [4, 16, 60])
@pytest.mark.parametrize("chi", [CHI, None])
@pytest.mark.filterwarnings("ignore::runtime.prompt.PromptCutWarning")
def test_as_diffusers(path: Path, chi: list[str] | None, length: int) -> None:
    ids, mask, selected = diffusers_tokens(path, PROMPTS, chi, length)
    template = PromptTemplate(complex_human_instruction="\n".join(chi or []), max_sequence_length=length)
    got = PromptTokenizer(path, template).encode(PROMPTS)
    assert got.ids.dtype == got.mask.dtype == np.int64
    assert got.selected_mask.dtype == np.float32
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.mask, mask)
    np.testing.assert_array_equal(got.selected_mask, selected)


@pytest.mark.slow
def test_negative_prompts_have_no_instruction(path: Path) -> None:
    tokenizer = PromptTokenizer(path, PromptTemplate(complex_human_instruction="\n".join(CHI), max_sequence_length=20))
    got = tokenizer.encode(["", "blur"], negative=True)
    np.testing.assert_array_equal(got.ids, diffusers_tokens(path, ["", "blur"], None, 20)[0])
    assert got.ids.shape == (2, tokenizer.sequence_length(negative=True)) == (2, 20)
    assert got.selected_mask.sum(axis=1).tolist() == [1, 5]  # <bos> alone for the empty prompt
    assert tokenizer.sequence_length() > 20


@pytest.mark.parametrize("chi", ["\n".join(CHI), ""])
def test_a_cut_is_shown(path: Path, chi: str) -> None:
    tokenizer = PromptTokenizer(path, PromptTemplate(complex_human_instruction=chi, max_sequence_length=12))
    kept = 10 if chi else 11
    with pytest.warns(PromptCutWarning) as caught:
        tokenizer.encode(["ok", "ABCDEFGHI KLMN opq"])
    assert len(caught) == 1
    assert repr("abcdefghi klmn opq"[kept:]) in str(caught[0].message)
    assert f"{18 - kept} tokens too long for the 12" in str(caught[0].message)


def test_a_prompt_that_just_fits_is_not_cut(path: Path) -> None:
    tokenizer = PromptTokenizer(path, PromptTemplate(max_sequence_length=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode(["bcdefghijkl"]).mask.sum() == 12


def test_case_is_kept_when_the_template_says_so(path: Path) -> None:
    keep = PromptTokenizer(path, PromptTemplate(max_sequence_length=12, lowercase=False))
    assert not np.array_equal(keep.encode(["User"]).ids, keep.encode(["user"]).ids)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (7, "got int; expected a string or a list"),
        (None, "got NoneType"),
        (b"apple", "got bytes"),
        ([], "got 0; expected 1 to 1024"),
        (["a"] * 1025, "got 1025"),
        (["a", 3], r"prompts\[1\]: got int \('3'\); expected a string"),
        (["a" * 100_001], "got 100001 characters"),
        ("\ud83c", "surrogate"),
    ],
)
def test_prompts_that_are_refused(prompts: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_prompts(prompts)


def test_prompts_that_are_allowed() -> None:
    assert check_prompts("") == [""]
    assert check_prompts(("a", "b" * 100_000)) == ["a", "b" * 100_000]


@pytest.mark.parametrize("token", ["<pad>", "<bos>"])
def test_missing_special_token(path: Path, tmp_path: Path, token: str) -> None:
    (bad := tmp_path / "tokenizer.json").write_text(path.read_text().replace(token, "<other>"))
    with pytest.raises(CheckpointError, match=f"no token '{token}'"):
        PromptTokenizer(bad, PromptTemplate())


def test_bos_must_come_first(path: Path, tmp_path: Path) -> None:
    data = json.loads(path.read_text())
    data["post_processor"] = None
    (bad := tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"became the tokens \[\]; expected \[2\]"):
        PromptTokenizer(bad, PromptTemplate())


def test_not_a_tokenizer(tmp_path: Path) -> None:
    (bad := tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        PromptTokenizer(bad, PromptTemplate())
    with pytest.raises(CheckpointError, match="cannot be read"):
        PromptTokenizer(tmp_path / "none.json", PromptTemplate())


@pytest.mark.parametrize("length", [0, 1, 9000])
def test_bad_template(length: int) -> None:
    with pytest.raises(SpecError, match="max_sequence_length"):
        PromptTemplate(max_sequence_length=length)
