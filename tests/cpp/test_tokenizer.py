"""The C++ tokenizer gives the ids of the tokenizers library, and says where in the text each token begins."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from golden import make_prompt_corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "sana-tiny" / "tokenizer" / "tokenizer.json"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "prompts.json").read_text(encoding="utf-8"))
PROMPTS = [case["prompt"] for case in GOLDEN]


def equal(ask, path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    answers = ask([("tokens", f"{path}\0{text}".encode()) for text in texts])
    for text, (kind, body) in zip(texts, answers, strict=True):
        assert kind == "ok", body
        ids, starts = np.frombuffer(body, np.int64).reshape(-1, 2).T
        expected = tokenizer.encode(text)
        assert ids.tolist() == expected.ids, text
        assert starts.tolist() == [len(text[:start].encode()) for start, _ in expected.offsets], text


def random_texts(count: int) -> list[str]:
    """Runs of characters of many kinds, special tokens, and all kinds of space."""
    chance = random.Random(13)
    parts = [
        "<bos>",
        "<pad>",
        "<eos>",
        "<unk>",
        "< pad>",
        "'s",
        "'ll",
        " 're",
        "  ",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x1c",
        "\u0085",
    ]
    parts += [
        *"aZ09²Ⅷ½é猫ｱｶ\u0301\u200b\u200d🏳️👩𝔘\U000e0001_-.,!?…()'\"",
        "the",
        "background",
        "\ufeff",
        "\x00",
        "\u1fff",
        "▁",
        "▁▁",
        "Ġ",
    ]
    return ["".join(chance.choices(parts, k=chance.randrange(1, 30))) for _ in range(count)]


def test_golden(ask):
    tokenizer = Tokenizer.from_file(str(TINY))
    assert [tokenizer.encode(prompt).ids for prompt in PROMPTS] == [case["ids"] for case in GOLDEN]
    for case, (_, body) in zip(GOLDEN, ask([("tokens", f"{TINY}\0{prompt}".encode()) for prompt in PROMPTS]), strict=True):
        assert np.frombuffer(body, np.int64)[::2].tolist() == case["ids"], case["prompt"]


def test_sana_tiny(ask):
    equal(ask, TINY, [*PROMPTS, *random_texts(1500), "", " ", "a" * 5000, "猫" * 700])


def test_every_character(ask):
    """Each in a place where its class decides where words end. Unicode 15 and later are newer than the tables of the C++ side."""
    known = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000 and re.match(r"\w|\s|[^\w\s]", chr(code))]
    equal(ask, TINY, [f"a{c}1{c} {c}{c}" for c in known[::9]])


def gemma_like(path: Path, texts: list[str] = PROMPTS, *, vocabulary: int = 900, alphabet: int = 200) -> Path:
    """A tokenizer.json with the parts of Gemma-2's, trained on the texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, limit_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "<h1>")])
    tokenizer.add_tokens([AddedToken("a b", normalized=True)])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    tokenizer.save(str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    # bytes are ordinary tokens of the vocabulary in Gemma's file
    document["added_tokens"] = [each for each in document["added_tokens"] if not each["content"].startswith("<0x")]
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_gemma(ask, tmp_path):
    path = gemma_like(tmp_path / "tokenizer.json")
    texts = [*PROMPTS, *random_texts(1500), "a b a  b", "\n\n\n\n\n", "x" * 3000]
    equal(ask, path, texts)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]  # as older files have them
    for byte_fallback, fuse_unk in ((False, True), (False, False)):
        document["model"] |= {"byte_fallback": byte_fallback, "fuse_unk": fuse_unk}
        path = tmp_path / f"{byte_fallback}-{fuse_unk}.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        equal(ask, path, texts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "NFKC"}}, "the normalizer 'NFKC'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer 'Whitespace'"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]}}, "the post-processor 'BertProcessing'"),
        ({"model": {"type": "Unigram", "vocab": []}}, "the model 'Unigram'"),
        ({"model": None}, "no model"),
        ({"added_tokens": [{"id": 0, "content": "<pad>", "lstrip": True}]}, "the added token '<pad>' with lstrip"),
    ],
)
def test_parts_that_it_does_not_know_are_refused(ask, tmp_path, changes, words):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(TINY.read_bytes()) | changes))
    ((kind, text),) = ask([("tokens", f"{path}\0x".encode())])
    assert kind == "CheckpointError"
    assert words in text.decode()
    assert text.decode().startswith(str(path))


def answered(ask, path: Path, texts: list[str]) -> list[list[int]]:
    answers = ask([("tokens", f"{path}\0{text}".encode()) for text in texts])
    assert {kind for kind, _ in answers} == {"ok"}
    return [np.frombuffer(body, np.int64)[::2].tolist() for _, body in answers]


def test_corpus(ask):
    """Digests that both sides are held to, so that neither drifts together with the other."""
    corpus = make_prompt_corpus.prompts()
    assert len(corpus) == 2000
    assert len({text for _, text in corpus}) > 1950
    golden = json.loads((ROOT / "tests" / "golden" / "prompt_corpus.json").read_text())
    assert make_prompt_corpus.golden() == golden
    ids = answered(ask, TINY, [text for _, text in corpus])
    for language, expected in golden.items():
        mine = [row for (each, _), row in zip(corpus, ids, strict=True) if each == language]
        assert make_prompt_corpus.digest(mine) == expected["ids"], language


def test_corpus_with_a_tokenizer_like_gemmas(ask, tmp_path):
    texts = [text for _, text in make_prompt_corpus.prompts()]
    path = gemma_like(tmp_path / "tokenizer.json", texts[::3], vocabulary=4000, alphabet=500)
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() > 3000
    assert any("<0x" in token for text in texts for token in tokenizer.encode(text).tokens)  # some characters fall back to bytes
    equal(ask, path, texts)


def test_damaged_files_are_refused(ask, tmp_path):
    """None crashes it, and none is taken for a tokenizer that it is not."""
    chance = random.Random(14)
    whole = json.dumps(
        json.loads(TINY.read_bytes()) | {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}
    )
    requests = []
    for number in range(300):
        at = chance.randrange(len(whole))
        path = tmp_path / f"{number}.json"
        path.write_text(
            whole[:at] + chance.choice(["", "[", "null", '"', "9", "{}", "-1", "}"]) + whole[at + chance.choice([0, 1, 4]) :]
        )
        requests.append(("tokens", f"{path}\0abba".encode()))
    assert {kind for kind, _ in ask(requests)} <= {"ok", "CheckpointError"}


def test_a_normalizer_that_doubles_and_doubles(ask, tmp_path):
    path = tmp_path / "tokenizer.json"
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    changes = {"normalizer": {"type": "Sequence", "normalizers": [doubling] * 40}}
    path.write_text(json.dumps(json.loads(TINY.read_bytes()) | changes))
    ((kind, text),) = ask([("tokens", f"{path}\0a".encode())])
    assert kind == "CheckpointError"
    assert "a normalizer that makes a text of more than 16 MB" in text.decode()
