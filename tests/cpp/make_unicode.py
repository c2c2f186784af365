"""Write runtime/cpp/src/unicode_tables.inc: `python tests/cpp/make_unicode.py`. What Python says of each code point.

The C++ side has no Unicode library, and must agree with Python's `str.lower`, `str.strip`, `repr` and `\\w`, and with the letters,
numbers and spaces of the tokenizers' regular expressions. Made with Python 3.11 (Unicode 14); a newer Python knows more characters.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

OUT = Path(__file__).parents[2] / "runtime" / "cpp" / "src" / "unicode_tables.inc"
CODE_POINTS = range(sys.maxunicode + 1)


def is_ignorable(c: str) -> bool:
    """Skipped when a capital sigma looks for the letter before it. Python has no function for it, but acts on it."""
    return ("A" + c + "Σ").lower().endswith("ς") and not is_cased(c)


def is_cased(c: str) -> bool:
    return (c + "Σ").lower().endswith("ς")


RANGES: dict[str, Callable[[str], bool]] = {
    "kUnprintable": lambda c: not c.isprintable(),
    "kLetter": lambda c: unicodedata.category(c).startswith("L"),
    "kNumber": lambda c: unicodedata.category(c).startswith("N"),
    "kSpace": str.isspace,
    "kWord": str.isalnum,
    "kCased": is_cased,
    "kCaseIgnorable": is_ignorable,
}


def ranges(holds: Callable[[str], bool]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for code in CODE_POINTS:
        if holds(chr(code)):
            if found and found[-1][1] == code - 1:
                found[-1] = (found[-1][0], code)
            else:
                found.append((code, code))
    return found


def rows(items: list[str]) -> str:
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) + 2 > 128:
            lines.append(line)
            line = "   "
        line += f" {item},"
    return "\n".join([*lines, line])


def tables() -> str:
    parts = [
        f"// Written by tests/cpp/make_unicode.py with Python {sys.version_info.major}.{sys.version_info.minor}, "
        f"Unicode {unicodedata.unidata_version}. Do not edit."
    ]
    for name, holds in RANGES.items():
        parts.append(f"constexpr Range {name}[] = {{\n{rows([f'{{0x{a:x}, 0x{b:x}}}' for a, b in ranges(holds)])}\n}};")
    lower = [(code, chr(code).lower()) for code in CODE_POINTS if chr(code).lower() != chr(code)]
    single = [f"{{0x{code:x}, 0x{ord(text):x}}}" for code, text in lower if len(text) == 1]
    parts.append(f"constexpr Lower kLower[] = {{\n{rows(single)}\n}};")
    assert [code for code, text in lower if len(text) > 1] == [0x130], "unicode.cpp knows one letter that becomes two"
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    OUT.write_text(tables(), encoding="utf-8")
