"""The sana-tiny that ships: whole, small, licensed, and judged on captions that its training cannot have seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from sana_ref.checkpoint import load
from train.tiny.captions import COLOUR_NAMES, KIND_NAMES, LANGUAGES, SPOKEN, held_out_colour, held_out_pair
from train.tiny.emoji_list import CLASSES
from train.tiny.layout import WEIGHT_FILES
from train.tiny.recogniser import load as load_recogniser

MODEL = Path(__file__).parents[2] / "models" / "sana-tiny"
PAIRS = ("left_right", "above_below")


@pytest.fixture(scope="module")
def captions() -> dict[str, list[dict[str, Any]]]:
    return json.loads((MODEL / "held_out_captions.json").read_text(encoding="utf-8"))


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 40e6


@pytest.mark.parametrize("path", WEIGHT_FILES.values())
def test_weights_are_whole_and_finite(path: str) -> None:
    with safe_open(MODEL / path, framework="pt") as file:
        for name in file.keys():
            assert file.get_tensor(name).isfinite().all(), name


def test_every_weights_file_is_listed() -> None:
    assert {path.relative_to(MODEL).as_posix() for path in MODEL.rglob("*.safetensors")} == set(WEIGHT_FILES.values())


@pytest.mark.slow
def test_checkpoint_and_recogniser_load() -> None:
    import torch

    checkpoint = load(MODEL)
    for part in (checkpoint.transformer, checkpoint.vae, checkpoint.text_encoder):
        part(torch.float32)
    _, classes = load_recogniser(MODEL / "recogniser")
    assert classes == [name for _, name, _ in CLASSES]


def test_held_out_captions_are_of_combinations_that_training_leaves_out(captions: dict[str, list[dict[str, Any]]]) -> None:
    names = [name for _, name, _ in CLASSES]
    assert list(captions) == list(KIND_NAMES)
    for kind, rows in captions.items():
        assert len(rows) == (400 if kind == "single" else 100)
        for row in rows:
            first, colour = names[row["first"]], COLOUR_NAMES[row["colour"]]
            if kind in PAIRS:
                assert row["first"] != row["second"], row
                assert held_out_pair(first, names[row["second"]]), row
            else:
                assert row["second"] == -1
                assert held_out_colour(first, colour), row


def test_held_out_captions_say_the_colour_and_are_lower_case(captions: dict[str, list[dict[str, Any]]]) -> None:
    for rows in captions.values():
        for row in rows:
            text = row["caption"]
            assert any(form in text for form in SPOKEN[row["language"]][COLOUR_NAMES[row["colour"]]]), row
            assert text == text.lower()
        assert {row["language"] for row in rows} == set(LANGUAGES)


def test_card_names_the_licence_and_has_whole_tables() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "SIL Open Font License 1.1 (OFL)" in card
    assert "Noto Color Emoji" in card
    blocks: list[list[str]] = [[]]
    for line in card.splitlines():
        if line.startswith("|"):
            assert line.endswith("|"), line
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    tables = [block for block in blocks if block]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) <= set("| -")
