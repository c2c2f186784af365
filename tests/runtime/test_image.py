"""Pixels as diffusers makes them; PNG files that keep them, say how they were drawn, and are read with suspicion."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import runtime.image
from engines.errors import DiskFullError, ManifestError, RequestError, SanaError
from runtime.image import INFO_KEY, PART_PIXELS, read_picture, read_picture_info, save_png, to_images
from runtime.picture_info import PictureInfo, RecipeInfo
from runtime.schedule import make_schedule

INFO = PictureInfo(
    prompt='ein roter Apfel, "赤いりんご" 🍎\n\\',
    negative_prompt="",
    seed=2**64 - 1,
    guidance=4.5,
    width=64,
    height=32,
    schedule=RecipeInfo.of(make_schedule("flow_euler", flow_shift=1.7, spacing=[1.0, 0.5]).recipe),
    model="tiny",
    bundle_digest="0" * 64,
    backend="onnxruntime",
    device="CPU",
    batch_size=1,
    batch_index=0,
    program="tests",
)


def picture(info: str | None = INFO.model_dump_json()) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8))
    if info is not None:
        image.info[INFO_KEY] = info
    return image


@pytest.mark.slow
def test_pixels_as_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    halves = (np.arange(256, dtype=np.float32) + 0.5) / 255 * 2 - 1  # where rounding decides
    decoded = np.concatenate([np.random.default_rng(0).normal(0, 1, 3 * 64 * 64 - 256).astype(np.float32), halves])
    decoded = decoded.reshape(1, 3, 64, 64)
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded.copy()))[0]
    assert np.array_equal(np.asarray(to_images(decoded)[0]), np.asarray(theirs))


def test_parts_of_a_picture_meet() -> None:
    decoded = np.random.default_rng(0).normal(0, 1, (2, 3, 33 * 32, 2 * PART_PIXELS // (33 * 32) + 5)).astype(np.float32)
    wanted = np.rint((np.clip(decoded, -1, 1) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    for picture, levels in zip(to_images(decoded), wanted, strict=True):
        assert np.array_equal(np.asarray(picture), levels.transpose(1, 2, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(bad: float) -> None:
    decoded = np.zeros((2, 3, 32, 32), np.float32)
    decoded[1, 2, 3, 4] = bad
    with pytest.raises(SanaError, match=r"1 pixels that are not finite"):
        to_images(decoded)


def test_round_trip(tmp_path: Path) -> None:
    path = save_png(picture(), tmp_path / "new folder" / "a.png")
    image, info = read_picture(path)
    assert info == INFO == read_picture_info(path)
    assert image.tobytes() == picture().tobytes()
    assert info.schedule.recipe().make().sigmas.tolist() == make_schedule("flow_euler", None, 1.7, [1.0, 0.5]).sigmas.tolist()
    assert os.listdir(path.parent) == ["a.png"]


def test_writing_is_deterministic_and_replaces(tmp_path: Path) -> None:
    first = save_png(picture(), tmp_path / "a.png").read_bytes()
    assert save_png(picture(), tmp_path / "a.png").read_bytes() == first


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = save_png(picture(), tmp_path / "a.png")
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(runtime.image.os, "fsync", fail)
    with pytest.raises(DiskFullError if code == errno.ENOSPC else OSError):
        save_png(picture(None), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_only_png(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a name that ends in \.png"):
        save_png(picture(), tmp_path / "a.jpg")


def with_text(tmp_path: Path, text: str) -> Path:
    chunk = PngInfo()
    chunk.add_itxt(INFO_KEY, text)
    picture(None).save(tmp_path / "a.png", pnginfo=chunk)
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**64}, "seed: got"),
        ({"width": 33}, "width: got 33"),
        ({"width": 2**30}, "width"),
        ({"guidance": "4.5"}, "guidance"),
        ({"prompt": None}, "prompt: got None"),
        ({"prompt": "x" * 100_001}, "prompt"),
        ({"bundle_digest": "xyz"}, "bundle_digest"),
        ({"format": 2}, "format: got 2"),
        ({"promt": "a"}, "promt: unknown key; did you mean 'prompt'"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    document = json.loads(INFO.model_dump_json()) | change
    with pytest.raises(ManifestError, match=message):
        read_picture_info(with_text(tmp_path, json.dumps(document)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"seed": NaN}', "[" * 100_000, '{"prompt": "' + "x" * (5 << 20) + '"}'])
def test_metadata_that_is_not_ours(tmp_path: Path, text: str) -> None:
    with pytest.raises(ManifestError, match="metadata"):
        read_picture_info(with_text(tmp_path, text))


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(RequestError, match="cannot be read as a PNG"):
        read_picture(tmp_path / "text.png")
    picture(None).save(tmp_path / "plain.png")
    with pytest.raises(RequestError, match="without metadata"):
        read_picture(tmp_path / "plain.png")
    picture().save(tmp_path / "a.jpg")
    with pytest.raises(RequestError, match="cannot be read as a PNG"):
        read_picture(tmp_path / "a.jpg")
    whole = save_png(picture(), tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-1000])
    with pytest.raises(RequestError, match="pixels cannot be read"):
        read_picture(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes(whole[:30])
    with pytest.raises(RequestError, match=r"cannot be read as a PNG|without metadata"):
        read_picture(tmp_path / "cut.png")
