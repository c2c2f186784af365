"""Scenes are the same on every machine, show what they say where they say it, and leave out what training must not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.tiny.captions import ABOVE_BELOW, COLOUR_NAMES, LANGUAGES, LEFT_RIGHT, SINGLE, TEMPLATES, Scene, caption, held_out_colour
from train.tiny.emoji_list import CLASSES, EXTRA
from train.tiny.scenes import HeldOut, SceneTensors, compose, draw_scenes, palette
from train.tiny.sprites import Sprites


def test_the_list_of_emoji() -> None:
    assert (len(CLASSES), len(EXTRA)) == (120, 28)
    assert len({name for _, name, _ in CLASSES + EXTRA}) == 148
    assert len({character for character, _, _ in CLASSES + EXTRA}) == 148
    assert ("✂️", "pair of scissors", "pairs of scissors") in CLASSES
    assert ("🐶", "dog", "dogs") == CLASSES[0]


def test_scenes_repeat_and_differ_by_seed() -> None:
    one, same, other = (draw_scenes(50, seed=seed, num_objects=12) for seed in (3, 3, 4))
    assert all(np.array_equal(getattr(one, field), getattr(same, field)) for field in ("kind", "colour", "objects", "geometry"))
    assert not np.array_equal(one.geometry, other.geometry)


@pytest.mark.slow
def test_composed_picture_shows_objects_where_the_scene_says(sprites: Sprites) -> None:
    scenes = draw_scenes(20, seed=1, num_objects=12, kind=LEFT_RIGHT, aspect=320 / 192)
    tensors, colours = SceneTensors.of(scenes, "cpu"), palette("cpu")
    pictures = compose(tensors, sprites.rgba, width=320, height=192, colours=colours)
    assert pictures.shape == (20, 3, 192, 320)
    assert pictures.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(pictures[:, :, 0, 0], colours[tensors.colour] * 2 - 1)  # the corner is background
    for index in range(20):
        for place in range(2):
            x, y = scenes.geometry[index, place, :2]
            wanted = sprites.rgba[scenes.objects[index, place], :3, 64, 64].float() * 2 - 1
            torch.testing.assert_close(pictures[index, :, int(y * 192), int(x * 320)], wanted, atol=2e-3, rtol=0)
        assert scenes.geometry[index, 0, 0] < 0.5 < scenes.geometry[index, 1, 0]  # the first object is the left one


def test_composing_a_batch_equals_composing_one_by_one(sprites: Sprites) -> None:
    tensors = SceneTensors.of(draw_scenes(6, seed=2, num_objects=12), "cpu")
    size = {"width": 64, "height": 96, "colours": palette("cpu")}
    together = compose(tensors, sprites.rgba, **size)
    alone = torch.cat([compose(tensors[index : index + 1], sprites.rgba, **size) for index in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_training_scenes_contain_no_held_out_combination(sprites: Sprites) -> None:
    held = HeldOut.of(sprites.class_names)
    assert 0.02 < held.colour.mean() < 0.25
    assert not held.pair.diagonal().any()
    scenes = draw_scenes(3000, seed=5, num_objects=12, without=held)
    assert not held.hits(scenes).any()
    assert held.hits(draw_scenes(3000, seed=5, num_objects=12)).any()
    for index in range(200):  # spelled out, without the vectors
        colour = COLOUR_NAMES[scenes.colour[index]]
        assert not any(held_out_colour(sprites.class_names[i], colour) for i in scenes.objects[index] if i >= 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_pair_captions_name_both_objects_in_their_places(language: str, sprites: Sprites) -> None:
    left = {"en": "left", "de": "links", "fr": "à gauche", "es": "a la izquierda", "it": "a sinistra", "zh": "左边"}[language]
    rng = np.random.default_rng(0)
    for kind in (LEFT_RIGHT, ABOVE_BELOW):
        for template in range(len(TEMPLATES[language][kind])):
            text = caption(Scene(kind, 0, 2, 1), sprites.names, rng, language=language, template=template)
            assert "cat" in text
            assert "pizza" in text
            assert "{" not in text
            assert text == text.lower().strip()  # the pipeline lower-cases prompts
    assert left in caption(Scene(LEFT_RIGHT, 0, 2, 1), sprites.names, rng, language=language, template=0)


def test_english_articles(sprites: Sprites) -> None:
    rng = np.random.default_rng(0)
    orange = COLOUR_NAMES.index("orange")
    assert caption(Scene(SINGLE, 1, -1, orange), sprites.names, rng, language="en", template=0) == "an owl on an orange background"
    assert caption(Scene(SINGLE, 4, -1, 4), sprites.names, rng, language="en", template=0) == "a red apple on a yellow background"
