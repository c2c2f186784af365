"""Write tests/golden/prompt_corpus.json: `python tests/golden/make_prompt_corpus.py`. Digests of a corpus and of its ids.

The corpus: two thousand prompts in twelve languages, the same every time, of sentences and words, with what people and programs
do to text.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "models" / "sana-tiny" / "tokenizer" / "tokenizer.json"
COUNT = 2000

# language: sentences, things, and what may be said of them
LANGUAGES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "en": (
        ["a {1} {0} on a yellow background", "It's {1}, isn't it: the {0}!", "two {0}s to the left of a {1} house", "{0}, {1}, 4K"],
        ["apple", "castle", "T-Rex", "lighthouse", "octopus", "sailor's hat", "naïve café"],
        ["red", "old-fashioned", "glittering", "half-eaten", "very, very small"],
    ),
    "de": (
        ["ein {1}er {0} vor Schwarz", "Größe: {0}, {1}, über 100 m²", "„{0}“ – {1} & schön", "Was für ein {1}er {0}?!"],
        ["Fußball", "Oktopus", "Schlüssel", "Eichhörnchenschwanz", "Apfelstrudel", "ÜBERGRÖẞE"],
        ["grün", "süß", "weiß", "riesengroß", "überaus alt"],
    ),
    "fr": (
        ["un {0} {1} sur fond rose", "l'{0} d'été, {1}", "« {0} » : c'est {1}, n'est-ce pas ?", "deux {0}s {1}s et trois œufs"],
        ["éléphant", "arc-en-ciel", "hôtel", "cœur", "garçon", "noël"],
        ["bleu", "très âgé", "cassé", "à rayures", "doré"],
    ),
    "ru": (
        ["{1} {0} на синем фоне", "Это {1} {0}?", "ДВА ПРЕДМЕТА: {0} и {0}, {1}", "«{0}», {1}, 1925 год"],
        ["яблоко", "ёжик", "подъезд", "слон", "щенок", "зáмок"],
        ["красный", "маленький", "очень старый", "жёлтый"],
    ),
    "el": (
        ["{1} {0} σε κίτρινο φόντο", "Τι ωραίος {0}· είναι {1};", "ΔΥΟ {0} ΚΑΙ ΕΝΑΣ ΛΟΓΟΣ", "ο {0}ς, {1}"],
        ["ελέφαντας", "μήλο", "φάρος", "Όλυμπος", "κάστρο"],
        ["κόκκινος", "μικρός", "ΜΕΓΑΛΟΣ", "παλιός"],
    ),
    "zh": (
        ["黄色背景上的{1}{0}", "一只{1}{0}在左边，一只猫在右边", "{0}，{1}，4K高清！", "三个{0}和２个{1}苹果"],
        ["苹果", "熊猫", "城堡", "𠮷野家", "龍", "向日葵"],
        ["红色的", "很小的", "發光的", "古老的"],
    ),
    "ja": (
        ["黄色い背景の{1}{0}", "{0}が左、{1}猫が右", "「{0}」を{1}描いてください。", "ｶﾀｶﾅの{0}ー１２３"],
        ["りんご", "お城", "サッカーボール", "ラーメン", "か\u3099らす", "招き猫"],
        ["赤い", "大きな", "キラキラした", "静かな"],
    ),
    "ko": (
        ["노란 배경 위의 {1} {0}", "왼쪽에 {0}, 오른쪽에 고양이", "{0} 3개, {1}!", "예쁜 {0}를 그려줘"],
        ["사과", "코끼리", "성", "판다", "\u1112\u1161\u11ab글", "등대"],
        ["빨간", "작은", "아주 오래된", "반짝이는"],
    ),
    "ar": (
        ["{0} {1} على خلفية صفراء", "هل هذا {0} {1}؟", "{0}، ٢٣ مترًا", "صورة \u200f{0}\u200e {1}"],
        ["تفاحة", "قطة", "قلعة", "فيل", "مُحَمَّد", "منارة"],
        ["حمراء", "صغيرة", "قديمة جدًا", "لامعة"],
    ),
    "he": (
        ["{0} {1} על רקע צהוב", "האם זה {0}?", "\u2067{0}\u2069, {1}, 4K", "שָׁלוֹם {0}"],
        ["תפוח", "פיל", "טירה", "חתול", "מגדלור"],
        ["אדום", "קטן", "ישן מאוד", "נוצץ"],
    ),
    "hi": (
        ["पीली पृष्ठभूमि पर {1} {0}", "क्या यह {1} {0} है?", "{0} और १२ सेब", "एक {1} {0}।"],
        ["सेब", "हाथी", "किला", "बिल्ली", "क्षत्रिय", "प्रकाशस्तंभ"],
        ["लाल", "छोटा", "बहुत पुराना", "सुंदर"],
    ),
    "th": (
        ["{0}{1}บนพื้นหลังสีเหลือง", "นี่คือ{0}ใช่ไหม", "{0} ๑๒ ตัว {1}", "ภาพ{0}ที่{1}มากๆ"],
        ["แอปเปิ้ล", "ช้าง", "ปราสาท", "แมว", "ประภาคาร"],
        ["สีแดง", "เล็ก", "เก่าแก่", "สวยงาม"],
    ),
}
EMOJI = ["🦊", "👩‍🚀", "🏳️‍🌈", "👨‍👩‍👧", "1️⃣", "☃", "🇩🇪", "👍🏽", "🫠"]
SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n\n",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u2009",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\x0b",
    "\x85",
]
MARKS = ["\u0301", "\u0308", "\u0323", "\u20dd", "\u0489\u0489", "\ufe0f"]


def prompts() -> list[tuple[str, str]]:
    """(language, prompt)"""
    chance = random.Random(2000)
    names = sorted(LANGUAGES)
    return [(name, _changed(_sentence(name, chance), chance)) for name in (names[i % len(names)] for i in range(COUNT))]


def _sentence(name: str, chance: random.Random) -> str:
    sentences, things, words = LANGUAGES[name]
    made = [
        chance.choice(sentences).format(chance.choice(things), chance.choice(words)) for _ in range(chance.choice([1, 1, 1, 2, 5]))
    ]
    if chance.random() < 0.15:  # languages mix
        other = chance.choice(sorted(LANGUAGES))
        made.append(chance.choice(LANGUAGES[other][1]))
    return chance.choice([" ", ", ", "; ", "\n", ""]).join(made)


def _changed(text: str, chance: random.Random) -> str:
    """As other keyboards, editors and careless hands leave it."""
    if chance.random() < 0.2:
        text = chance.choice([str.upper, str.lower, str.title, str.swapcase])(text)
    if chance.random() < 0.2:
        text = unicodedata.normalize(chance.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
    for extra, share in (
        (EMOJI, 0.25),
        (SPACES, 0.4),
        (MARKS, 0.15),
        (["12", "3.5", "½", "٣", "Ⅷ", "²"], 0.15),
        (["<bos>", "<pad>"], 0.02),
    ):
        while chance.random() < share:
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(extra) + text[at:]
    return text


def digest(rows: list[object]) -> str:
    """SHA-256 of the rows as JSON, one a line, ASCII, no spaces."""
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def golden() -> dict[str, dict[str, object]]:
    """By language: how many prompts, the digest of the prompts, and of their ids."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    found: dict[str, dict[str, object]] = {}
    corpus = prompts()
    for language in sorted({language for language, _ in corpus}):
        texts = [text for each, text in corpus if each == language]
        ids = [tokenizer.encode(text).ids for text in texts]
        found[language] = {"count": len(texts), "prompts": digest(texts), "ids": digest(ids)}
    return found


if __name__ == "__main__":
    Path(__file__).with_name("prompt_corpus.json").write_text(json.dumps(golden(), indent=1) + "\n")
