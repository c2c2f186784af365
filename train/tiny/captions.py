"""What a scene is called: a grammar of captions in six languages, and which combinations training never sees.

A scene shows one object, two different objects (left and right, or above and below), or two or three of the same. Names come from
Unicode CLDR, where grammatical gender is not given: the templates of languages that would need it avoid articles and agreement.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

LANGUAGES = {"en": 0.65, "de": 0.08, "fr": 0.07, "es": 0.07, "it": 0.06, "zh": 0.07}  # share of the captions
COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB of the plain backgrounds
    "white": (246, 246, 246),
    "black": (28, 28, 32),
    "red": (214, 48, 49),
    "orange": (245, 140, 40),
    "yellow": (250, 220, 70),
    "green": (60, 165, 75),
    "blue": (52, 105, 215),
    "purple": (135, 70, 185),
    "pink": (250, 160, 195),
    "grey": (140, 145, 150),
}
COLOUR_NAMES = tuple(COLOURS)
# The forms of a colour that the templates of a language use: {c} and, for German, {d} (dative).
SPOKEN: dict[str, dict[str, tuple[str, str]]] = {
    language: dict(zip(COLOURS, zip(plain.split(), (dative or plain).split(), strict=True), strict=True))
    for language, plain, dative in (
        ("en", " ".join(COLOURS), ""),
        (
            "de",
            "weißer schwarzer roter oranger gelber grüner blauer violetter rosa grauer",
            "weißem schwarzem rotem orangem gelbem grünem blauem violettem rosa grauem",
        ),
        ("fr", "blanc noir rouge orange jaune vert bleu violet rose gris", ""),
        ("es", "blanco negro rojo naranja amarillo verde azul morado rosa gris", ""),
        ("it", "bianco nero rosso arancione giallo verde blu viola rosa grigio", ""),
        ("zh", "白色 黑色 红色 橙色 黄色 绿色 蓝色 紫色 粉色 灰色", ""),
    )
}

SINGLE, LEFT_RIGHT, ABOVE_BELOW, TWO, THREE = range(5)  # kinds of scenes; of a pair the first object is the left or the upper one
KIND_NAMES = ("single", "left_right", "above_below", "two", "three")

# {A}, {B}: name with its article where there is one; {P}: plural; {a}, {b}: bare name; {c}, {d}: colour.
# Templates without a colour leave it to the model: a scene of any colour fits.
TEMPLATES: dict[str, dict[int, tuple[str, ...]]] = {
    "en": {
        SINGLE: (
            "{A} on a {c} background",
            "{A} on {c}",
            "{a} on a {c} background",
            "{A}, {c} background",
            "a {c} background with {A}",
            "a picture of {A} on a {c} background",
            "{a}, {c}",
            "{A} in front of a {c} wall",
            "{A}",
        ),
        LEFT_RIGHT: (
            "{A} on the left and {B} on the right, {c} background",
            "{A} left of {B} on a {c} background",
            "{B} right of {A} on a {c} background",
            "{A} to the left of {B}, {c} background",
            "{B} to the right of {A} on {c}",
            "{B} on the right, {A} on the left, {c} background",
            "{A} on the left and {B} on the right",
        ),
        ABOVE_BELOW: (
            "{A} above {B} on a {c} background",
            "{B} below {A} on a {c} background",
            "{A} at the top and {B} at the bottom, {c} background",
            "{B} under {A}, {c} background",
            "{A} over {B} on {c}",
            "{B} at the bottom, {A} at the top, {c} background",
            "{A} above {B}",
        ),
        TWO: (
            "two {P} on a {c} background",
            "two {P}, {c} background",
            "2 {P} on {c}",
            "a picture of two {P} on a {c} background",
            "two {P}",
        ),
        THREE: (
            "three {P} on a {c} background",
            "three {P}, {c} background",
            "3 {P} on {c}",
            "a picture of three {P} on a {c} background",
            "three {P}",
        ),
    },
    "de": {
        SINGLE: ("{a} auf {d} hintergrund", "{a} vor {d} hintergrund", "{a}, {c} hintergrund", "{a}"),
        LEFT_RIGHT: (
            "{a} links und {b} rechts, {c} hintergrund",
            "{a} links von {b} auf {d} hintergrund",
            "rechts {b}, links {a}, {c} hintergrund",
        ),
        ABOVE_BELOW: (
            "{a} oben und {b} unten, {c} hintergrund",
            "{a} über {b} auf {d} hintergrund",
            "{b} unter {a}, {c} hintergrund",
        ),
        TWO: ("zweimal {a} auf {d} hintergrund", "zweimal {a}, {c} hintergrund"),
        THREE: ("dreimal {a} auf {d} hintergrund", "dreimal {a}, {c} hintergrund"),
    },
    "fr": {
        SINGLE: ("{a} sur fond {c}", "{a}, fond {c}", "{a} devant un mur {c}", "{a}"),
        LEFT_RIGHT: (
            "{a} à gauche et {b} à droite, fond {c}",
            "{a} à gauche, {b} à droite sur fond {c}",
            "à droite {b}, à gauche {a}, fond {c}",
        ),
        ABOVE_BELOW: (
            "{a} en haut et {b} en bas, fond {c}",
            "{a} au-dessus, {b} en dessous, fond {c}",
            "en bas {b}, en haut {a}, fond {c}",
        ),
        TWO: ("deux fois {a} sur fond {c}", "deux fois {a}, fond {c}"),
        THREE: ("trois fois {a} sur fond {c}", "trois fois {a}, fond {c}"),
    },
    "es": {
        SINGLE: ("{a} sobre fondo {c}", "{a}, fondo {c}", "{a} delante de un muro {c}", "{a}"),
        LEFT_RIGHT: ("{a} a la izquierda y {b} a la derecha, fondo {c}", "a la derecha {b}, a la izquierda {a}, fondo {c}"),
        ABOVE_BELOW: ("{a} arriba y {b} abajo, fondo {c}", "{a} encima de {b} sobre fondo {c}", "{b} debajo de {a}, fondo {c}"),
        TWO: ("dos veces {a} sobre fondo {c}", "dos veces {a}, fondo {c}"),
        THREE: ("tres veces {a} sobre fondo {c}", "tres veces {a}, fondo {c}"),
    },
    "it": {
        SINGLE: ("{a} su sfondo {c}", "{a}, sfondo {c}", "{a} davanti a un muro {c}", "{a}"),
        LEFT_RIGHT: ("{a} a sinistra e {b} a destra, sfondo {c}", "a destra {b}, a sinistra {a}, sfondo {c}"),
        ABOVE_BELOW: ("{a} sopra e {b} sotto, sfondo {c}", "{a} sopra {b} su sfondo {c}", "{b} sotto {a}, sfondo {c}"),
        TWO: ("due volte {a} su sfondo {c}", "due volte {a}, sfondo {c}"),
        THREE: ("tre volte {a} su sfondo {c}", "tre volte {a}, sfondo {c}"),
    },
    "zh": {
        SINGLE: ("{c}背景上的{a}", "{a},{c}背景", "{a}"),
        LEFT_RIGHT: ("左边是{a},右边是{b},{c}背景", "{a}在{b}的左边,{c}背景", "{b}在{a}的右边,{c}背景"),
        ABOVE_BELOW: ("上面是{a},下面是{b},{c}背景", "{a}在{b}的上面,{c}背景", "{b}在{a}的下面,{c}背景"),
        TWO: ("两个{a},{c}背景", "{c}背景上的两个{a}"),
        THREE: ("三个{a},{c}背景", "{c}背景上的三个{a}"),
    },
}

Names = dict[str, list[str]]  # language code -> names, the usual one first; "plural" -> English plural


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption can say. `second` is -1 unless two different objects are shown; colour indexes COLOUR_NAMES."""

    kind: int
    first: int
    second: int
    colour: int


def with_article(name: str) -> str:
    """ "a cat", "an owl"; nothing before plurals and masses."""
    if name.split()[0] in {"grapes", "cherries", "corn", "broccoli", "bread", "cheese", "popcorn", "scissors"} or name.endswith(
        "fries"
    ):
        return name
    sounds_like_you = name.startswith(("uni", "euro"))
    return f"an {name}" if name[0] in "aeiou" and not sounds_like_you else f"a {name}"


def caption(
    scene: Scene, names: list[Names], rng: np.random.Generator, *, language: str | None = None, template: int | None = None
) -> str:
    """One caption of the scene, lower case. Language, template and English synonym are drawn from `rng` unless given."""
    if language is None:
        language = rng.choice(list(LANGUAGES), p=list(LANGUAGES.values()))
    templates = TEMPLATES[language][scene.kind]
    text = templates[int(rng.integers(len(templates))) if template is None else template]
    first, second = (_name(names[index][language], rng) if index >= 0 else "" for index in (scene.first, scene.second))
    plain, dative = SPOKEN[language][COLOUR_NAMES[scene.colour]]
    text = text.format(
        a=first,
        b=second,
        c=plain,
        d=dative,
        P=names[scene.first]["plural"][0],
        A=with_article(first),
        B=with_article(second) if second else "",
    )
    return text.replace("a orange", "an orange") if language == "en" else text


def _name(choices: list[str], rng: np.random.Generator) -> str:
    return choices[0] if len(choices) == 1 or rng.random() < 0.75 else choices[int(rng.integers(1, len(choices)))]


def _bucket(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:4]) % 100


def held_out_colour(name: str, colour: str) -> bool:
    """Whether training never shows this object (English name) on this colour: about one combination in ten."""
    return _bucket("colour", name, colour) < 10


def held_out_pair(name: str, other: str) -> bool:
    """Whether training never shows these two together, in either order: about one pair in twenty. A pair is of two different."""
    return name != other and _bucket("pair", *sorted((name, other))) < 5
