"""Write tests/golden/prompts.json: `python tests/golden/make_prompts.py`. Prompts in ten languages, and the ids of sana-tiny."""

import json
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "models" / "sana-tiny" / "tokenizer" / "tokenizer.json"

# language: sentences, and five things that are put into each
WORDS: dict[str, tuple[list[str], list[str]]] = {
    "en": (
        [
            "a {} on a yellow background",
            "It's a {}, isn't it?",
            "  two {}s,   3.5 m apart\n",
            "A {} — \"4K\", 50% off; we've seen they'll go!",
        ],
        ["red apple", "european castle", "café table", "T-Rex", "0'Neill's surf-board"],
    ),
    "de": (
        ["{} vor schwarzem Hintergrund", "Größe: {} über 100 m²", "ein schönes {} ‚für dich‘", "{}?! Straße Nr. 12b"],
        ["Fußball", "Oktopus", "Wassermelone", "Schlüssel", "ÜBERGRÖẞE"],
    ),
    "fr": (
        ["un {} sur fond rose", "l'{} d'été à gauche", "« {} » : c'est ça, n'est-ce pas ?", "deux {}s et trois œufs"],
        ["éléphant", "arc-en-ciel", "hôtel", "cœur", "garçon"],
    ),
    "es": (
        ["{} delante de un muro negro", "¿Dónde está el {}?", "¡{} a la derecha, fondo azul!", "tres {} pequeños"],
        ["campana", "piruleta", "pingüino", "niño", "corazón"],
    ),
    "ru": (
        ["{} на синем фоне", "Это {}?", "ДВА {} рядом с деревом", "«{}», 1925 год"],
        ["красное яблоко", "ёжик", "Подъезд", "слон", "щенок"],
    ),
    "zh": (
        ["黄色背景上的{}", "一只{}在左边，一只猫在右边", "{}，4K高清！", "三个{}和２个苹果"],
        ["红苹果", "熊猫", "城堡", "𠮷野家", "龍"],
    ),
    "ja": (
        ["黄色い背景の{}", "{}が左、猫が右", "「{}」を描いてください。", "ｶﾀｶﾅの{}ー１２３"],
        ["りんご", "お城", "サッカーボール", "ラーメン", "か\u3099らす"],
    ),
    "ar": (
        ["{} على خلفية صفراء", "هل هذا {}؟", "{}، ٢٣ مترًا", "صورة \u200f{}\u200e جميلة"],
        ["تفاحة حمراء", "قطة", "قلعة", "فيل", "مُحَمَّد"],
    ),
    "hi": (
        ["पीली पृष्ठभूमि पर {}", "क्या यह {} है?", "{} और १२ सेब", "एक सुंदर {}।"],
        ["लाल सेब", "हाथी", "किला", "बिल्ली", "क्षत्रिय"],
    ),
    "ko": (
        ["노란 배경 위의 {}", "왼쪽에 {}, 오른쪽에 고양이", "{} 3개!", "예쁜 {}를 그려줘 👩‍🚀🏳️‍🌈"],
        ["빨간 사과", "코끼리", "성", "판다", "\u1112\u1161\u11ab글"],
    ),
}


def prompts() -> list[str]:
    return [sentence.format(thing) for sentences, things in WORDS.values() for sentence in sentences for thing in things]


def golden() -> list[dict[str, object]]:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    return [{"prompt": prompt, "ids": tokenizer.encode(prompt).ids} for prompt in prompts()]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in golden())
    Path(__file__).with_name("prompts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
